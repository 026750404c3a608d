"""Device selection, random numbers on a device, casts of weights, private names of PyTorch, output streams and CSV tables."""
