"""Section ids."""

from __future__ import annotations

import re


def safe_id(text: str) -> str:
    """Convert a text to a valid section id."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-") or "section"
