"""One step: forward, loss, backward, gradients, update."""
