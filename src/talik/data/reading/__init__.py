"""Reads rows from local files and from data sets on hubs."""
