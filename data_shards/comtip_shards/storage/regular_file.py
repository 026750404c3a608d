"""Small files read whole: only regular ones, and only up to a limit."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MAX_BYTES = 2**30
"""Largest file of a shard set that is read whole."""


def read_regular(path: Path, limit: int = MAX_BYTES, *, follow: bool = True) -> bytes:
    """Return the bytes of a regular file.

    Parameters
    ----------
    path
        The file. A pipe or a device is refused, because reading it may never end.
    limit
        Most bytes.
    follow
        Whether ``path`` may be a symbolic link. Where the bytes are not checked against a hash, it should not.

    Raises
    ------
    OSError
        There is no such file, it is not regular, it is larger than ``limit``, or it cannot be read.
    """
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    with open(os.open(path, flags), "rb") as file:  # noqa: PTH123
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        data = b"" if status.st_size > limit else file.read(limit + 1)
        if status.st_size > limit or len(data) > limit:  # files of /proc say that they are empty
            raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return data
