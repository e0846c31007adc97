"""Converts rows of the known data formats to messages."""
