"""The data: from files of rows to batches of token ids with their masks."""
