"""Reading and verification of a shard set."""
