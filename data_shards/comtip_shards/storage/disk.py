"""Classification of disk errors: temporary ones (no space, failed device), and those that require another path."""

from __future__ import annotations

import errno
import os
import re

_TEMPORARY = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is exhausted",
    errno.EFBIG: "the file exceeds the maximum file size",
    errno.EIO: "the device failed",
    errno.ESTALE: "the file server lost the file",
}
_FIXES = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "delete files of this user or ask for a larger quota",
    errno.EFBIG: "raise the limit (`ulimit -f`) or use a file system that allows larger files",
    errno.EIO: "check the disk or the network mount",
    errno.ESTALE: "mount the file system again",
}
_PERMANENT = {
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "too many symbolic links",
}
# Python raises these as PermissionError; the libraries below raise them as other classes.
_WRAPPED = {errno.EACCES: "permission denied", errno.EPERM: "not permitted"}
# safetensors writes "(os error 28)", HDF5 "errno = 28".
_NUMBER = re.compile(r"(?:os error |errno = )(\d+)")


def error_number(error: BaseException) -> int | None:
    """Return the errno of an error, also if a library (safetensors, HDF5) states it only in the text; None if there is none."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else None


def disk_trouble(error: BaseException) -> str | None:
    """Return a description of a temporary disk error, after which the same command can succeed; None for other errors."""
    return _describe(error, _TEMPORARY)


def disk_fix(error: BaseException) -> str:
    """Return the fix for an error that :func:`disk_trouble` describes, to be continued with ", then ..." or ", or ..."."""
    return _FIXES[error_number(error) or errno.ENOSPC]


def unwritable(error: BaseException) -> str | None:
    """Return a description of an error because of which a path can never be written; None for other errors."""
    wrapped = {} if isinstance(error, OSError) and error.errno is not None else _WRAPPED
    return _describe(error, _PERMANENT | wrapped)


def _describe(error: BaseException, known: dict[int, str]) -> str | None:
    number = error_number(error)
    if number not in known:
        return None
    name = getattr(error, "filename", None)
    return f"{name}: {known[number]}" if name else f"{known[number]} ({os.strerror(number)})"
