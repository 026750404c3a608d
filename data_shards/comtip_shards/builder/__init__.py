"""Building and merging of shard sets."""

from comtip_shards.builder.build import BuildReport, build_shards
from comtip_shards.builder.merge import merge_sets

__all__ = ["BuildReport", "build_shards", "merge_sets"]
