"""Rows of all sources -> tokenized examples, on all cores, kept on disk."""
