"""Shared parts of the readers for 10x Genomics formats: runs, matrices, features, alignments and pooled sections."""
