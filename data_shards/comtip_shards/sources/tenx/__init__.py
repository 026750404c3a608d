"""Parts of 10x Genomics formats: runs, matrices, features, alignments, pooled sections."""
