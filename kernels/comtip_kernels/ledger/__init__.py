"""Evidence without a GPU: ahead-of-time compilation of every kernel, compared with a committed table."""
