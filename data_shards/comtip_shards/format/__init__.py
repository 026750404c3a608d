"""What is stored in a shard set: manifest, record, index and spot table (see FORMAT.md)."""
