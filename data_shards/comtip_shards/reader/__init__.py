"""Reading and verifying a shard set."""
