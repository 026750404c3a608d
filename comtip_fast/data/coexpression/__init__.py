"""Gene vectors from co-expression in count matrices without images."""
