"""Rows of every known data format -> messages."""
