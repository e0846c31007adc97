"""A model's name, folder or GGUF file -> a local folder."""
