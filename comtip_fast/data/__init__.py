"""Data of training and prediction: batches from shard records (genes, levels, step panel, views, loaders), and sections."""
