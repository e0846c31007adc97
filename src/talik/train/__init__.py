"""Training: the frozen trunk once, the thawed top step by step."""
