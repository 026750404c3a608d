"""Checks of counts: spots match counts, genes are known, spots are neither empty nor duplicates."""

from __future__ import annotations

import hashlib

import numpy as np

from comtip_shards.genes.identifiers import map_genes
from comtip_shards.qc.context import SectionContext
from comtip_shards.qc.result import OK, WARN, Finding, graded, not_applicable
from comtip_shards.sections.scaled_counts import MIN_SPOTS, SPREAD_EQUAL, SPREAD_RATIO, spread, totals_of
from comtip_shards.sources.files.spots import NO_COUNTS, NO_POSITION
from comtip_shards.sources.spatialdata_source import NO_ROW, NO_SHAPE

JOIN_WARN, JOIN_FAIL = 0.01, 0.2
"""Share of spots with only counts or only a position. Some arrays omit spots at the rim; if a fifth is missing, the two
files belong to different sections or name spots differently."""
LOST = {NO_COUNTS: "spots", NO_POSITION: "spots", NO_SHAPE: "", NO_ROW: ""}
"""{reason for which spots were dropped: subject of the message}, for spots with only counts or only a position. Spots dropped for
other reasons, such as "not in tissue", have both."""
GENES_WARN, GENES_FAIL = 0.05, 0.5
"""Share of counts of genes without a known identifier: clones and control probes are 1 to 3 %; half or more indicates
another species or another kind of identifier."""
EMPTY_COUNTS, EMPTY_WARN, EMPTY_FAIL = 10, 0.05, 0.5
"""A spot with fewer than ``EMPTY_COUNTS`` counts is uninformative; up to 1 spot in 20 is common, at the rim of fresh tissue."""
REPEATED_COUNTS, REPEATED_WARN, REPEATED_FAIL = 20, 0.001, 0.05
"""Two spots with at least ``REPEATED_COUNTS`` counts that are equal in every gene are duplicates, not a coincidence."""


def join(context: SectionContext) -> Finding:
    """Check for spots that are in only one of the two files, counts and positions."""
    dropped = context.section.dropped
    lost = {f"{LOST[reason]} {reason}".strip(): n for reason, n in dropped.items() if reason in LOST}
    figure = sum(lost.values()) / (len(context.section.spot_ids) + sum(dropped.values()))
    message = "; ".join(f"{n} {what}" for what, n in lost.items()) or "every spot has counts and a position"
    return graded(
        "join",
        figure,
        JOIN_WARN,
        JOIN_FAIL,
        message,
        "check that counts and positions belong to the same section and use the same spot ids",
    )


def genes(context: SectionContext) -> Finding:
    """Check the share of counts that are of genes without a known identifier; the message also counts keys of several genes."""
    section = context.section
    mapped = map_genes(section.gene_ids, section.meta.species, symbols=section.gene_symbols)
    total = int(context.totals.sum())
    if not total:
        return not_applicable("genes", "there are no counts")
    summed = mapped.sum_columns(section.counts, f"section {section.meta.section_id}")
    kept = int(summed.sum(dtype=np.int64))
    message = (
        f"{len(mapped.unmapped)} of {len(section.gene_ids)} genes, with {1 - kept / total:.2%} of all counts, have no known "
        f"identifier; keys that sum several genes: {len(mapped.collisions)}"
    )
    return graded(
        "genes",
        1 - kept / total,
        GENES_WARN,
        GENES_FAIL,
        message,
        "check `species` and that genes are symbols or Ensembl ids",
    )


def empty_spots(context: SectionContext) -> Finding:
    """Check for spots with fewer than ``EMPTY_COUNTS`` counts."""
    rows = np.flatnonzero(context.totals < EMPTY_COUNTS)
    share = len(rows) / len(context.totals)
    message = f"{len(rows)} of {len(context.totals)} spots have fewer than {EMPTY_COUNTS} counts (median {np.median(context.totals):.0f})"
    return graded(
        "empty_spots",
        share,
        EMPTY_WARN,
        EMPTY_FAIL,
        message,
        "leave them out (in_tissue = 0), or check that counts are raw"
        if context.section.n_pooled is None
        else "pool wider squares (`pool_um`), or check that counts are raw",
        spots=tuple(rows.tolist()),
    )


def repeated_spots(context: SectionContext) -> Finding:
    """Check for spots with the counts or the position of another spot."""
    counts = context.section.counts
    seen: dict[bytes, int] = {}
    rows = set()
    for i in np.flatnonzero(context.totals >= REPEATED_COUNTS):
        part = slice(counts.indptr[i], counts.indptr[i + 1])
        order = np.argsort(counts.indices[part])
        content = counts.indices[part][order].tobytes() + counts.data[part][order].tobytes()
        first = seen.setdefault(hashlib.sha256(content).digest(), int(i))
        rows |= {first, int(i)} if first != i else set()
    _, where, times = np.unique(context.section.xy, axis=0, return_inverse=True, return_counts=True)
    rows |= set(np.flatnonzero(times[where.ravel()] > 1).tolist())
    message = f"{len(rows)} of {len(context.totals)} spots have the same counts or position as another"
    return graded(
        "repeated_spots",
        len(rows) / len(context.totals),
        REPEATED_WARN,
        REPEATED_FAIL,
        message,
        "remove the duplicate spots from the source",
        spots=tuple(sorted(rows)),
    )


def equal_totals(context: SectionContext) -> Finding:
    """Check for spots that all have the same number of counts although they differ in the number of detected genes.

    Counts that were scaled up to one total are refused when a section is read (:mod:`comtip_shards.sections.scaled_counts`).
    """
    name, counts = "equal_totals", context.section.counts
    figure, detected = spread(totals_of(counts)), spread(np.diff(counts.indptr).astype(np.float64))
    if not np.isfinite(figure):
        return not_applicable(name, f"fewer than {MIN_SPOTS} spots have counts")
    equal = figure < min(SPREAD_EQUAL, SPREAD_RATIO * detected)
    message = f"the totals of spots differ by {figure:.1%} (median {np.median(context.totals):.0f}), the numbers of detected genes by {detected:.1%}"
    return Finding(
        name=name,
        status=WARN if equal else OK,
        figure=round(figure, 4),
        threshold=SPREAD_EQUAL,
        message=message,
        advice="counts that were down-sampled to one total are fine; normalised values that were rounded are not: use the raw counts"
        if equal
        else "",
    )
