"""Tissue sections to WebDataset shards of tiles and raw counts, and back. Needs neither torch nor a GPU."""

from comtip_shards.errors import ShardError, SourceError
from comtip_shards.reader import ShardSet

__all__ = ["ShardError", "ShardSet", "SourceError"]
