"""Why a training loop runs out of memory or learns the wrong tokens."""
