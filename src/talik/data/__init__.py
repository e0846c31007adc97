"""The data: from a file of rows to batches of token ids with their masks."""
