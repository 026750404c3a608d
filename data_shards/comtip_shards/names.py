"""Names read from files: which of them may become part of a path, and how paths are joined from them.

A section id, the name of a shard or a hash in a manifest is chosen by whoever wrote the file. Each is checked by this
module when it is read, so that no later code has to ask whether a name leaves its folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from comtip_shards.errors import ShardError

MAX_NAME, MAX_SECTION_ID = 200, 100
"""Longest file name and section id, in characters, which are bytes: only ASCII is accepted. File systems take 255
bytes, and suffixes such as ``-0000.tar`` are appended to a section id."""
FOREIGN = "do not use this set; get it again from where it was published, or build it again"
"""What to do about a name that no build gives."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
"""Names that Windows opens as a device, with any extension."""


def problem_with(name: str, limit: int = MAX_NAME) -> str:
    """Return why a name may not become one part of a path, or "" where it may.

    Parameters
    ----------
    name
        A section id, or one part of a file name.
    limit
        Most characters.
    """
    if not name:
        return "is empty"
    if len(name) > limit:
        return f"has {len(name)} characters, at most {limit} are allowed"
    if not name.isprintable():
        return "holds control characters"
    if "/" in name or "\\" in name or ":" in name or name in (".", ".."):
        return "leaves the folder"
    if name[0] == ".":
        return "begins with a dot"
    if not _NAME.fullmatch(name):
        return (
            "holds other characters than ASCII letters, digits, '.', '_' and '-', or begins with one of the last three"
        )
    if name[-1] == "." or name.split(".")[0].lower() in _DEVICES:
        return "is not a file name on every system (a trailing dot, or a device of Windows)"
    return ""


def problem_with_file(name: str) -> str:
    """Return why a relative file name such as ``shards/A1-0000.tar`` may not be joined to a folder, or ""."""
    if name.startswith("/"):
        return "leaves the folder"
    return next((problem for part in name.split("/") if (problem := problem_with(part))), "")


def shown(name: str) -> str:
    """Return a name from a file for an error message: quoted, control characters escaped, cut to 100 characters."""
    return ascii(name[:100]) + ("..." if len(name) > 100 else "")


def printable(text: str) -> str:
    """Return a text for a terminal: control characters other than line ends and tabs are escaped.

    Names and notes of a set may hold escape sequences, which a terminal would carry out.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def check_section_id(section_id: str, where: str, error: Callable[[str], Exception], fix: str) -> None:
    """Refuse a section id that may not become part of a path.

    Parameters
    ----------
    section_id
        As it was read.
    where
        File and field, for the message.
    error
        Makes the exception to raise from its message.
    fix
        What to do, for the message.

    Raises
    ------
    error
        Naming ``where``, the id, what is wrong with it, and ``fix``.
    """
    problem = problem_with(section_id, MAX_SECTION_ID)
    if problem:
        raise error(f"{where}: the section id {shown(section_id)} {problem}; {fix}")


def same_file(names: Iterable[str]) -> tuple[str, str] | None:
    """Return two of the names that are one file where upper and lower case are not told apart, or None."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            return other, name
    return None


def is_sha256(text: str) -> bool:
    """Tell whether a text is a SHA-256 in lower-case hex: hashes name files in the cache."""
    return _SHA256.fullmatch(text) is not None


def inside(folder: Path, name: str) -> Path:
    """Join a relative file name to a folder.

    Parameters
    ----------
    folder
        Trusted.
    name
        Parts separated by ``/``.

    Raises
    ------
    ShardError
        The name leaves the folder, or is no file name.
    """
    problem = problem_with_file(name)
    if problem:
        raise ShardError(f"{folder}: the file name {shown(name)} {problem}", kind="manifest")
    return folder.joinpath(*name.split("/"))
