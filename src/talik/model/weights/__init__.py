"""Weights by byte range: safetensors files, conversion, digests, working copies, models without weights."""
