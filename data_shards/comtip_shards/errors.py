"""Exceptions of this package. Each message names the file and the fix."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RECORD_FAULTS = ("vanished", "truncated", "checksum", "unreadable", "remote", "index", "tile", "counts")
"""Kinds of :class:`ShardError` for which a single record may be skipped; FORMAT.md defines each."""


def install_extra(name: str) -> str:
    """Return the command that installs an extra of the distribution which provides this package, for messages."""
    try:
        version("comtip-shards")  # this package alone; comtip-fast contains it too
    except PackageNotFoundError:
        return f"pip install 'comtip-fast[{name}]'"
    return f"pip install 'comtip-shards[{name}]'"


_ORIGINS: dict[str, str] = {}
"""{path of a temporary copy: the user's file from which it was unpacked}."""


def register_copy(copy: Path, origin: Path) -> None:
    """Remember that ``copy`` was unpacked from ``origin``, so that messages name the file that the user knows."""
    for path in {str(copy), str(copy.resolve())}:
        _ORIGINS[path] = str(origin)


def name_origins(text: str) -> str:
    """Return a message in which the user's files replace temporary copies; a member of an archive is named ``ARCHIVE/MEMBER``."""
    for copy in sorted(_ORIGINS, key=len, reverse=True):  # the name of a copy may begin with that of another
        text = text.replace(copy, _ORIGINS[copy])
    return text


class SourceError(ValueError):
    """A source (table, image, counts, request) cannot be used; the message names the file and the fix.

    Where the message names a temporary copy of a packed file, the packed file is named instead.
    """

    def __init__(self, message: str) -> None:
        super().__init__(name_origins(message))


class UnforeseenError(SourceError):
    """A library raised an error that no reader handles; the message names the section and the error."""


class UnknownSection(SourceError):
    """A source has no section with the requested id."""


class ShardError(ValueError):
    """A shard set cannot be read or written; the message names the file and, for a record, its key.

    ``kind`` is the category under which the error is counted; FORMAT.md lists all of them.
    """

    def __init__(self, message: str, *, kind: str = "set") -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        """Pickle the message and the kind, so that a worker process can return the error."""
        return _shard_error, (str(self), self.kind)


def _shard_error(message: str, kind: str) -> ShardError:
    return ShardError(message, kind=kind)
