"""Reading of regular files with a size limit."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 2**30
"""Maximum size of a file of a shard set that is read into memory at once."""


def read_regular(path: Path, limit: int = MAX_BYTES, *, follow: bool = True) -> bytes:
    """Return the bytes of a regular file.

    Parameters
    ----------
    path
        The file. Pipes and devices are refused, because reading them may block forever.
    limit
        Maximum size in bytes.
    follow
        Whether ``path`` may be a symbolic link. Pass False if the bytes are not checked against a hash.

    Raises
    ------
    OSError
        The file does not exist, is not regular, is larger than ``limit``, or cannot be read.
    """
    with open_regular(path, limit, follow=follow) as file:
        data = file.read(limit + 1)
        if len(data) > limit:  # files in /proc report a size of 0
            raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return data


def open_regular(path: Path, limit: int, *, follow: bool = True) -> BinaryIO:
    """Open a regular file of at most ``limit`` bytes for reading; raises OSError like :func:`read_regular`."""
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    file = open(os.open(path, flags), "rb")  # noqa: PTH123, SIM115
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        file.close()
        if stat.S_ISREG(status.st_mode):
            raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file
