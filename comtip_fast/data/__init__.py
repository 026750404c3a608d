"""From shard records to batches: genes, levels, step panel, views, loaders."""
