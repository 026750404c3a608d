"""The two ways this package says no. Each message names the file and what to do about it."""

from __future__ import annotations


class SourceError(ValueError):
    """A source (table, image, counts, request) cannot be used; the message names the file and the fix."""


class ShardError(ValueError):
    """A shard set on disk is damaged or not what it says; the message names shard and, where known, key."""
