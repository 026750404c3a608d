"""Text of a gene: upper-case symbol and lower-case full name, so that most orthologues have the same text."""

from __future__ import annotations


def gene_text(symbol: str, name: str) -> str:
    """Return the text of a gene, e.g. ``"KRT14 keratin 14"``; symbol and full name may be empty.

    Lone surrogates, which a wrongly decoded file can contain, are replaced by ``?``, because UTF-8 cannot encode them.
    """
    text = f"{symbol.strip().upper()} {name.strip().lower()}".strip()
    return text.encode("utf-8", "replace").decode("utf-8")
