"""The frozen trunk, the training step, and the loop around them."""
