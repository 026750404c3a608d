"""On-disk format of a shard set: manifest, records, index and spot table (see FORMAT.md)."""
