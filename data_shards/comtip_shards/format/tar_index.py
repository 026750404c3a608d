"""Offsets of a shard's members, read from its tar headers; members that are links or folders, or have a path as name, are refused."""

from __future__ import annotations

import tarfile
from pathlib import Path

from comtip_shards.errors import ShardError
from comtip_shards.format.record import MAX_MEMBER_BYTES
from comtip_shards.names import FOREIGN


def index_tar(path: Path, where: str = "", fix: str = "copy the shard again") -> dict[str, tuple[int, int]]:
    """Return {member name: (offset of its data, size)}.

    Parameters
    ----------
    path
        The tar file.
    where
        Name of the shard for error messages; by default its path.
    fix
        What to do if the file is damaged, for error messages.

    Raises
    ------
    ShardError
        The file is missing, truncated or not a tar, or a member is not a regular file, is too large or a duplicate, or has a
        name with a slash or a leading dot.
    """
    where = where or str(path)
    members: dict[str, tuple[int, int]] = {}
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isreg() or "/" in info.name or "\\" in info.name or info.name.startswith("."):
                    raise ShardError(f"{where}: member {info.name!r} is not a regular file of a record; {FOREIGN}")
                if info.size > MAX_MEMBER_BYTES or info.offset_data + info.size > size:
                    raise ShardError(
                        f"{where}: member {info.name} has {info.size} bytes by its header, more than the shard or the format "
                        f"allows; {fix}"
                    )
                if info.name in members:
                    raise ShardError(f"{where}: duplicate member {info.name}; {fix}")
                members[info.name] = (info.offset_data, info.size)
    except FileNotFoundError as error:
        raise ShardError(f"{where}: the shard is missing; copy it back or build the set again") from error
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{where}: not a readable tar file ({error}); {fix}") from error
    return members
