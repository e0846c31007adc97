"""Turns files of rows into batches of token ids with their masks."""
