"""Device choice, random numbers on a device, and output streams."""
