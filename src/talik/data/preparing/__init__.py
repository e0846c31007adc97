"""Turns the rows of all sources into tokenized examples, on all cores, and keeps them on disk."""
