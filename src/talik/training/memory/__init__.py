"""Memory of a step: the store of weight blocks, and the scratch of named tensors."""
