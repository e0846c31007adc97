"""Training steps on fake tensors: every storage's birth and death, without numbers."""
