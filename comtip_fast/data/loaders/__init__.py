"""Loaders: DALI, WebDataset and plain threads return the same batches in the same order."""
