"""The two ways this package says no. Each message names the file and what to do about it."""

from __future__ import annotations

RECORD_FAULTS = ("vanished", "truncated", "checksum", "unreadable", "remote", "index", "tile", "counts")
"""Kinds of :class:`ShardError` that a record can be left out for; FORMAT.md says what each is."""


class SourceError(ValueError):
    """A source (table, image, counts, request) cannot be used; the message names the file and the fix."""


class ShardError(ValueError):
    """A shard set on disk is damaged or not what it says; the message names shard and, where known, key.

    ``kind`` is a word to count by; FORMAT.md lists them.
    """

    def __init__(self, message: str, *, kind: str = "set") -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        """Pickle with the kind, so that a worker process can hand it back."""
        return _shard_error, (str(self), self.kind)


def _shard_error(message: str, kind: str) -> ShardError:
    return ShardError(message, kind=kind)
