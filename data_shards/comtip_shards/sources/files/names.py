"""Conversion of names to section ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from comtip_shards.errors import SourceError


def safe_id(text: str) -> str:
    """Return a text with characters that a section id must not contain replaced by ``_``; ``section`` if nothing is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-") or "section"


def by_section_id(
    names: Iterable[str], what: str, where: Path | str, section: Callable[[str], str] = safe_id
) -> dict[str, str]:
    """Return {section id: name} of the sections of a source.

    Parameters
    ----------
    names
        Names in the source; equal names are one section.
    what
        What the names are, in the plural, for the message.
    where
        The source, for the message.
    section
        Converts a name to a section id.

    Raises
    ------
    SourceError
        Two names have the same section id.
    """
    out: dict[str, str] = {}
    for name in names:
        other = out.setdefault(section(name), name)
        if other != name:
            raise SourceError(
                f"{where}: the {what} {other!r} and {name!r} have the same section id {section(name)}, in which "
                "characters other than letters, digits, ., _ and - become _; rename one"
            )
    return out
