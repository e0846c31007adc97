"""Where blocks of weights (store) and named tensors (scratch) are held."""
