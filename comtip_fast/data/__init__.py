"""Data of training and prediction: batches from shard records (genes, levels, the panel of genes of a step, views, loaders), and sections."""
