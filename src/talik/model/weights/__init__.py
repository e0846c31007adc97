"""Weights by byte range: safetensors files, conversion, digests, working copies, hollow models."""
