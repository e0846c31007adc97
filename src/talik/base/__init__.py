"""Errors, events, files and everything that differs between operating systems."""
