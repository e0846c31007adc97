"""The training step on fake (shape-only) tensors: allocation and release of every storage."""
