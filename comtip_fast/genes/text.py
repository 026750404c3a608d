"""A gene as text: upper-case symbol and lower-case full name, so that orthologues share text."""

from __future__ import annotations


def gene_text(symbol: str, name: str) -> str:
    """Return ``"KRT14 keratin 14"``; the full name may be empty."""
    return f"{symbol.strip().upper()} {name.strip().lower()}".strip()
