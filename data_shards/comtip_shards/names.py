"""Validation of names read from files before they become part of a path.

Section ids, shard names and hashes in a manifest are chosen by whoever wrote the file. This module checks each of them
when it is read, so that later code need not check whether a name escapes its folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from comtip_shards.errors import ShardError

MAX_NAME, MAX_SECTION_ID = 200, 100
"""Maximum length of a file name and of a section id, in characters. Only ASCII is accepted, so characters are bytes. File
systems allow 255 bytes, and suffixes such as ``-0000.tar`` are appended to a section id."""
FOREIGN = "do not use this set; get it again from where it was published, or build it again"
"""The fix in messages about content that no build writes."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PATH = re.compile(r"[/\\]|[A-Za-z]:[/\\]")
_OTHER = re.compile(r"[^A-Za-z0-9._-]")
_FORMULA = re.compile(r"[=+@\t\r]|-(?![\d.])")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
"""Device names reserved by Windows, with any extension."""


def problem_with(name: str, limit: int = MAX_NAME) -> str:
    """Return why a name is not allowed as one component of a path, or "" if it is allowed.

    Parameters
    ----------
    name
        A section id, or one component of a file name.
    limit
        Maximum number of characters.
    """
    if not name:
        return "is empty"
    if len(name) > limit:
        return f"has {len(name)} characters; at most {limit} are allowed"
    if not name.isprintable():
        return "contains characters that cannot be printed"
    if _PATH.match(name) or ".." in re.split(r"[/\\]", name):
        return "leaves the folder"
    other = _OTHER.search(name)
    if other is not None:
        return f"contains {other[0]!r}; only ASCII letters, digits, '.', '_' and '-' are allowed"
    if not _NAME.fullmatch(name):
        return f"begins with {name[0]!r}; the first character must be a letter or a digit"
    if name[-1] == ".":
        return "ends with a dot, which is not allowed on every system"
    device = name.split(".", maxsplit=1)[0]
    if device.lower() in _DEVICES:
        return f"is not allowed on every system, because {device!r} is a device name of Windows"
    return ""


def problem_with_file(name: str) -> str:
    """Return why a relative file name such as ``shards/A1-0000.tar`` must not be joined to a folder, or "" if it may be."""
    parts = name.split("/")
    if not parts[0] or ".." in parts:
        return "leaves the folder" if name else "is empty"
    return next((problem for part in parts if (problem := problem_with(part))), "")


def shown(name: str) -> str:
    """Return a name for an error message: quoted, truncated to 100 characters, all but printable ASCII characters escaped."""
    return ascii(name[:100]) + ("..." if len(name) > 100 else "")


def is_formula(text: str) -> bool:
    """Return whether a spreadsheet would run a cell as a formula; a ``-`` before a digit or a dot begins a number."""
    return _FORMULA.match(text) is not None


def printable(text: str) -> str:
    """Return a text that is safe to print to a terminal: unprintable characters except newlines and tabs are escaped.

    Names and notes of a set may contain escape sequences, which a terminal would execute.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def check_section_id(section_id: str, where: str, error: Callable[[str], Exception], fix: str) -> None:
    """Check that a section id is allowed as a component of a path.

    Parameters
    ----------
    section_id
        The id as read from the file.
    where
        File and field, for the message.
    error
        Exception type, or a function that returns the exception for a message.
    fix
        What to do, for the message.

    Raises
    ------
    Exception
        The exception of ``error``, if the id is not allowed; its message states ``where``, the id, the problem and ``fix``.
    """
    problem = problem_with(section_id, MAX_SECTION_ID)
    if problem:
        raise error(f"{where}: the section id {shown(section_id)} {problem}; {fix}")


def same_file(names: Iterable[str]) -> tuple[str, str] | None:
    """Return two different names that denote the same file on a case-insensitive file system, or None."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            return other, name
    return None


def is_sha256(text: str) -> bool:
    """Return whether a text is a SHA-256 in lower-case hex; the cache uses hashes as file names."""
    return _SHA256.fullmatch(text) is not None


def inside(folder: Path, name: str) -> Path:
    """Join a relative file name to a folder.

    Parameters
    ----------
    folder
        A trusted path.
    name
        Components separated by ``/``.

    Raises
    ------
    ShardError
        The name escapes the folder or is not a valid file name.
    """
    problem = problem_with_file(name)
    if problem:
        raise ShardError(f"{folder}: the file name {shown(name)} {problem}; {FOREIGN}", kind="manifest")
    return folder.joinpath(*name.split("/"))
