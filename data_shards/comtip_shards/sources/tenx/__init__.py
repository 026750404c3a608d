"""Helpers shared by the readers of 10x Genomics formats, for output folders, matrices, features, alignments and pooled sections."""
