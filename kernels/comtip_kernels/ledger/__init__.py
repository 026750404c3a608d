"""Ahead-of-time compilation of every kernel without a GPU, compared with a committed table."""
