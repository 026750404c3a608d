"""Checks of counts: spots and counts joined, genes known, spots neither empty nor repeated."""

from __future__ import annotations

import hashlib

import numpy as np

from comtip_shards.genes.identifiers import map_genes
from comtip_shards.qc.context import SectionContext
from comtip_shards.qc.result import Finding, graded, not_applicable

JOIN_WARN, JOIN_FAIL = 0.01, 0.2
"""Share of spots with only counts or only a position. Arrays lose some on purpose (spots at the rim); with a fifth
gone the two files are of different sections or name spots differently."""
NOT_LOST = "not in tissue"
"""The one reason to leave a spot out that is no loss."""
GENES_WARN, GENES_FAIL = 0.05, 0.5
"""Share of counts of genes that no identifier is known for: clones and control probes make 1 to 3 %; half and more
means another species or another kind of identifier."""
EMPTY_COUNTS, EMPTY_WARN, EMPTY_FAIL = 10, 0.05, 0.5
"""A spot with fewer counts says nothing; up to 1 in 20 such spots is common at the rim of fresh tissue."""
REPEATED_COUNTS, REPEATED_WARN, REPEATED_FAIL = 20, 0.001, 0.05
"""Two spots with this many counts that agree in every gene are one spot written twice: chance does not do that."""


def join(look: SectionContext) -> Finding:
    """Spots that were in only one of the two files, counts and positions."""
    dropped = look.section.dropped
    lost = {reason: n for reason, n in dropped.items() if reason != NOT_LOST}
    figure = sum(lost.values()) / (len(look.section.spot_ids) + sum(dropped.values()))
    said = "; ".join(f"{n} spots {reason}" for reason, n in lost.items()) or "every spot has counts and a position"
    return graded(
        "join",
        figure,
        JOIN_WARN,
        JOIN_FAIL,
        said,
        "check that counts and positions are of one section and name spots alike",
    )


def genes(look: SectionContext) -> Finding:
    """Share of counts that is lost with genes whose identifier is not known, and genes that share one."""
    section = look.section
    mapped = map_genes(section.gene_ids, section.meta.species, symbols=section.gene_symbols)
    total = int(look.totals.sum())
    if not total:
        return not_applicable("genes", "there are no counts")
    kept = int(mapped.sum_columns(section.counts).sum(dtype=np.int64))
    said = (
        f"{len(mapped.unmapped)} of {len(section.gene_ids)} genes, with {1 - kept / total:.2%} of all counts, have no known "
        f"identifier; {len(mapped.collisions)} keys are sums of several"
    )
    return graded(
        "genes",
        1 - kept / total,
        GENES_WARN,
        GENES_FAIL,
        said,
        "check --species and that genes are symbols, Ensembl ids or Entrez ids",
    )


def empty_spots(look: SectionContext) -> Finding:
    """Spots with hardly a count."""
    rows = np.flatnonzero(look.totals < EMPTY_COUNTS)
    share = len(rows) / len(look.totals)
    said = f"{len(rows)} of {len(look.totals)} spots have fewer than {EMPTY_COUNTS} counts (median {np.median(look.totals):.0f})"
    return graded(
        "empty_spots",
        share,
        EMPTY_WARN,
        EMPTY_FAIL,
        said,
        "leave them out (in_tissue = 0), or check that counts are raw",
        spots=tuple(rows.tolist()),
    )


def repeated_spots(look: SectionContext) -> Finding:
    """Spots that have the counts, or the place, of another."""
    counts = look.section.counts
    seen: dict[bytes, int] = {}
    rows = set()
    for i in np.flatnonzero(look.totals >= REPEATED_COUNTS):
        part = slice(counts.indptr[i], counts.indptr[i + 1])
        order = np.argsort(counts.indices[part])
        content = counts.indices[part][order].tobytes() + counts.data[part][order].tobytes()
        first = seen.setdefault(hashlib.sha256(content).digest(), int(i))
        rows |= {first, int(i)} if first != i else set()
    _, where, times = np.unique(look.section.xy, axis=0, return_inverse=True, return_counts=True)
    rows |= set(np.flatnonzero(times[where.ravel()] > 1).tolist())
    said = f"{len(rows)} of {len(look.totals)} spots have exactly the counts, or the position, of another"
    return graded(
        "repeated_spots",
        len(rows) / len(look.totals),
        REPEATED_WARN,
        REPEATED_FAIL,
        said,
        "the source holds spots twice: remove the copies",
        spots=tuple(sorted(rows)),
    )
