"""Duplicate sections, found by their counts and by their image."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image
from scipy import sparse

from comtip_shards.errors import SourceError
from comtip_shards.sampling.rng import bits, key
from comtip_shards.sections.section import SectionMeta

SKETCH = 128
"""Number of spot hashes in a section's sketch: the smallest ones, so that sketches of sections that share spots overlap."""
MIN_PRINT_COUNTS = 20
"""Minimum counts of a hashed spot; spots with fewer counts may be equal by chance."""
SHARED_SPOTS, PICTURE_BITS = 0.2, 12
"""Two sections are duplicates if at least this share of the compared spots (and at least 2) has equal counts, or if at most this many
of the 256 bits of their images differ. Serial sections share no spot, and in ``samples/`` their images differ in 26 bits
or more; a downsampled and compressed copy differs in at most 5 from its original."""


def section_fingerprint(counts: sparse.csr_matrix, keys: Sequence[str], picture_HW3: np.ndarray) -> dict[str, str]:
    """Return the fingerprint of a section's content, by which duplicates under another id are found.

    It has the keys ``spots`` (the smallest spot hashes) and ``picture`` (256 bits of the image), both in base64.

    Parameters
    ----------
    counts
        Raw counts (spots, genes) by gene key; the fingerprint does not depend on gene names or row order of the source.
    keys
        Gene keys of the columns.
    picture_HW3
        uint8 RGB image of the complete section, any size.
    """
    smallest = np.sort(spot_hashes(counts, keys))[:SKETCH]
    return {"spots": _text(smallest.astype("<u8").tobytes()), "picture": _text(picture_bits(picture_HW3).tobytes())}


def spot_hashes(counts: sparse.csr_matrix, keys: Sequence[str]) -> np.ndarray:
    """Return the distinct hashes, uint64, of the expression of spots with enough counts."""
    counts = sparse.csr_matrix(counts)
    genes = np.array([key(0, "gene", k) for k in keys], np.uint64)
    # A sum is independent of the order of genes; hashing genes and counts avoids collisions between spots.
    entries = bits(0, "entry", index=genes[counts.indices] ^ bits(0, "count", index=counts.data))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(entries, dtype=np.uint64)])  # wraps modulo 2**64
    enough = np.asarray(counts.sum(axis=1)).ravel() >= MIN_PRINT_COUNTS
    return np.unique((sums[counts.indptr[1:]] - sums[counts.indptr[:-1]])[enough])


def picture_bits(picture_HW3: np.ndarray) -> np.ndarray:
    """Return 256 bits packed in 32 bytes: whether each cell of a grid is brighter than its left neighbour by more than 2 of 255.

    The grid has 16 rows and 17 columns, of which the first has no left neighbour.
    """
    small = np.asarray(Image.fromarray(picture_HW3).convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    return np.packbits(small[:, 1:] - small[:, :-1] > 2)


def check_duplicates(sections: Sequence[tuple[SectionMeta, Mapping[str, Any]]]) -> dict[str, str]:
    """Refuse duplicate sections in different splits; report duplicates in the same split, or if one of the two has no split.

    Parameters
    ----------
    sections
        (metadata, :func:`section_fingerprint`) of all sections of a set.

    Returns
    -------
    ``{section_id: note}`` for the second section of each pair of duplicates.

    Raises
    ------
    SourceError
        Duplicates are in different splits; the message names both sections and what they share.
    """
    notes: dict[str, str] = {}
    for i, j, shared in _alike([p for _, p in sections]) if len(sections) > 1 else ():
        (a, _), (b, _) = sections[i], sections[j]
        if a.split and b.split and a.split != b.split:
            raise SourceError(
                f"{a.section_id} (split {a.split}) and {b.section_id} (split {b.split}) are duplicates of one section: "
                f"{shared}; build without one of them (`samples`, or its row in a table of sources), or state the same donor "
                "(`donor`) and split (`splits`) for both"
            )
        notes[b.section_id] = f"possibly a duplicate of section {a.section_id}: {shared}"
    return notes


def duplicate_pairs(prints: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Return the pairs of indices (i, j), i < j, of :func:`section_fingerprint` results that show the same section."""
    return [(i, j) for i, j, _ in _alike(prints)] if len(prints) > 1 else []


def _alike(prints: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, str]]:
    """Yield (i, j, what they share) with i < j; only candidate pairs are compared, which scales to thousands of sections."""
    sketches = [np.frombuffer(base64.b64decode(p["spots"]), "<u8") for p in prints]
    holders: dict[int, list[int]] = {}
    for i, sketch in enumerate(sketches):
        for value in sketch.tolist():
            holders.setdefault(value, []).append(i)
    common = Counter(pair for held in holders.values() for pair in combinations(held, 2))
    raw = [np.frombuffer(base64.b64decode(p["picture"]), np.uint8) for p in prints]
    bits = np.unpackbits(np.array(raw, np.uint8).reshape(len(prints), -1), axis=1).astype(np.float32)
    distance = bits @ (1 - bits).T
    distance += distance.T
    # A blank image has hardly any bit set, and would match any other blank one.
    plain = bits.sum(1) <= 2 * PICTURE_BITS
    distance[plain] = distance[:, plain] = np.inf
    near = zip(*np.nonzero(np.triu(distance <= PICTURE_BITS, 1)), strict=True)
    for i, j in sorted({*common, *((int(i), int(j)) for i, j in near)}):
        shared = _shared_spots(sketches[i], sketches[j])
        if shared:
            yield i, j, shared
        elif distance[i, j] <= PICTURE_BITS:
            yield i, j, f"their images differ in {distance[i, j]:.0f} of 256 bits"


def _shared_spots(a: np.ndarray, b: np.ndarray) -> str:
    """Return a description of the spots that two sketches share, "" if there are too few for duplicates."""
    # Only hashes up to the largest one of a full sketch are comparable: above it, the sketch is cut off.
    limit = min((s[-1] for s in (a, b) if len(s) == SKETCH), default=np.uint64(2**64 - 1))
    a, b = a[a <= limit], b[b <= limit]
    common, least = len(np.intersect1d(a, b)), min(len(a), len(b))
    if common < 2 or common < SHARED_SPOTS * least:
        return ""
    return f"{common} of {least} compared spots have identical counts"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
