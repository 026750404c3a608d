"""A gene as text: upper-case symbol and lower-case full name, so that orthologues share text."""

from __future__ import annotations


def gene_text(symbol: str, name: str) -> str:
    """Return ``"KRT14 keratin 14"``; the full name may be empty.

    Half characters (lone surrogates, which a badly decoded file can hold) become ``?``: they have no bytes.
    """
    text = f"{symbol.strip().upper()} {name.strip().lower()}".strip()
    return text.encode("utf-8", "replace").decode("utf-8")
