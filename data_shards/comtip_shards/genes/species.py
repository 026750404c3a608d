"""Names of the species that genes are mapped for."""

from __future__ import annotations

_SPECIES = {
    "human": {"human", "homo sapiens", "h. sapiens", "hsapiens", "ncbitaxon:9606", "9606", "hs"},
    "mouse": {"mouse", "mus musculus", "m. musculus", "mmusculus", "ncbitaxon:10090", "10090", "mm"},
}


def species_name(text: str) -> str:
    """Return ``human`` or ``mouse`` for a common name, a Latin name or a taxonomy id, and any other text in lower case."""
    plain = " ".join(text.replace("_", " ").lower().split())
    return next((name for name, words in _SPECIES.items() if plain in words), plain)
