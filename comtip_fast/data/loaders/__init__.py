"""Loaders (PyTorch threads, WebDataset workers, DALI), which all return the same batches in the same order."""
