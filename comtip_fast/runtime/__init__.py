"""Device selection, random numbers on a device, casts of weights, garbage collection, private names of PyTorch, streams, CSV tables."""
