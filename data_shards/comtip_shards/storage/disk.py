"""Classes of disk errors: those that end when room is made or a device returns, and those that need another path."""

from __future__ import annotations

import errno
import os
import re

_TEMPORARY = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file may not grow so large",
    errno.EIO: "the device failed",
    errno.ESTALE: "the file server lost the file",
}
_PERMANENT = {
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "too many symbolic links",
}
# Python's own errors of these numbers have classes of their own; the libraries below raise them as something else.
_WRAPPED = {errno.EACCES: "permission denied", errno.EPERM: "not permitted"}
# safetensors writes "(os error 28)", HDF5 "errno = 28".
_NUMBER = re.compile(r"(?:os error |errno = )(\d+)")


def error_number(error: BaseException) -> int | None:
    """Return the system's number of an error, also where a library (safetensors, HDF5) has it in the text only."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else None


def disk_trouble(error: BaseException) -> str | None:
    """Return what is wrong with the disk where the same command can succeed later; None for any other error."""
    return _describe(error, _TEMPORARY)


def unwritable(error: BaseException) -> str | None:
    """Return why a path cannot be written, now or later; None for any other error."""
    wrapped = {} if isinstance(error, OSError) and error.errno is not None else _WRAPPED
    return _describe(error, _PERMANENT | wrapped)


def _describe(error: BaseException, known: dict[int, str]) -> str | None:
    number = error_number(error)
    if number not in known:
        return None
    name = getattr(error, "filename", None)
    return f"{name}: {known[number]}" if name else f"{known[number]} ({os.strerror(number)})"
