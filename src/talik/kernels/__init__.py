"""PyTorch operators of Talik's own. The docstring of each file says why it exists."""
