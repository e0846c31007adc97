"""Makes tokenized examples of the rows of all sources, with all cores, and keeps them on disk."""
