"""Expression levels, the gene panel, and the tables computed from the training split."""
