"""PyTorch operators of Talik's own; each file says why it exists."""
