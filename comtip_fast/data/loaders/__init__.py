"""Loaders: DALI, WebDataset and PyTorch threads return the same batches in the same order."""
