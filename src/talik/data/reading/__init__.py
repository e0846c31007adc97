"""Reads files and data sets of hubs as rows."""
