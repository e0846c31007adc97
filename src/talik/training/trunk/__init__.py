"""The frozen layers, run once over the data, and the cache of their hidden states."""
