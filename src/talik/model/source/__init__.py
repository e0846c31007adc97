"""Finds a model: a hub id, a folder or a GGUF file becomes a local folder."""
