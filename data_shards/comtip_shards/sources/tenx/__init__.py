"""Shared parts of the readers for 10x Genomics formats: output folders, matrices, features, alignments and pooled sections."""
