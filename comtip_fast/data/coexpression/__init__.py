"""Co-expression of genes in count matrices without images."""
