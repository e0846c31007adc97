"""Converts rows of every known data format to messages."""
