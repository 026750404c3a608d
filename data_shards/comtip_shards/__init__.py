"""Build and read WebDataset shards of image tiles and raw counts from tissue sections. Requires neither torch nor a GPU."""

from comtip_shards.errors import RECORD_FAULTS, ShardError, SourceError
from comtip_shards.reader.joined_set import open_sets
from comtip_shards.reader.shard_set import ShardSet

__all__ = ["RECORD_FAULTS", "ShardError", "ShardSet", "SourceError", "open_sets"]
