"""Shard records to batches: genes, levels, step panel, views, loader."""
