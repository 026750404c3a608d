"""Conversion of names to section ids."""

from __future__ import annotations

import re


def safe_id(text: str) -> str:
    """Return a text with characters that a section id must not contain replaced by ``_``; ``section`` if nothing is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-") or "section"
