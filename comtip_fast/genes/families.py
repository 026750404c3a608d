"""Gene families by symbol: KRT5 and KRT14 share the letters before the number."""

from __future__ import annotations

import re
from collections.abc import Sequence

ROOT = re.compile(r"^([A-Z]{2,})-?\d+[A-Z]*\d*$")
MIN_GENES = 3
"""Smallest number of genes in a family."""


def families(keys: Sequence[str]) -> dict[str, list[str]]:
    """Return gene families: at least three keys of one species whose symbols share the letters before a number (KRT5, KRT14).

    Keys are ``species:symbol``; a family's name is the species and these letters.
    """
    found: dict[str, list[str]] = {}
    for key in keys:
        species, _, symbol = key.partition(":")
        match = ROOT.match(symbol.upper())
        if match:
            found.setdefault(f"{species}:{match.group(1)}", []).append(key)
    return {name: genes for name, genes in found.items() if len(genes) >= MIN_GENES}
