"""Helpers of the AnnData reader, which read the libraries, counts, positions, metadata and images of a file."""
