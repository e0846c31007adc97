"""A model as a chain of blocks. Only this package knows how Transformers models are built."""
