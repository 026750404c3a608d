"""Recognition of counts that were scaled to the same total in all spots and then rounded to integers.

Two facts together identify them. Raw totals differ within a section by far more than scaled ones, which are equal up to
rounding. And where values were scaled up, the genes with one count in a spot all have the same larger value, so the smallest
value of the spot is its most frequent one and is not 1; in raw counts it is 1. Down-sampled counts also have equal totals, but
contain the value 1. Values that were scaled down and rounded also contain it, and cannot be told from down-sampled counts.

Measured on the 11 sections of ``data_shards/samples``, whose medians are 2,268 to 12,180 counts
(``python bench/shards/scaled_counts.py data_shards/samples``):

==================================  ==================  ==========================
counts                              spread of totals    share of spots without 1
==================================  ==================  ==========================
raw                                 1.03 to 2.22        0
down-sampled to one total           0                   0
scaled to 10,000, rounded           0.02 to 0.20        0.07 to 0.87
scaled to the median, rounded       0.07 to 0.23        0.08 to 0.31
scaled to 1,000,000, rounded        0.0002 to 0.002     0.45 to 1
==================================  ==================  ==========================
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

MIN_SPOTS, MIN_DETECTED = 10, 20
"""Fewer spots, or spots with fewer detected genes, are not judged."""
SPREAD_SCALED, SHARE_WITHOUT_ONES = 0.35, 0.05
"""Counts are scaled if the spread of totals is below the first value and the share of spots without a 1 above the second."""
SHARE_OF_ONES = 0.35
"""Smallest share of a spot's values that is taken for its scaled ones. In a panel of 20 genes with many counts each, no gene has one
count, and the smallest value may be the most frequent one by chance; with this share, in at most 2 % of simulated spots."""
SPREAD_EQUAL, SPREAD_RATIO = 0.25, 0.5
"""Totals are suspiciously equal if their spread is below the first value and below the second times the spread of the numbers of
detected genes. Raw totals vary more than numbers of detected genes, which saturate."""


def totals_of(counts: sparse.csr_matrix) -> np.ndarray:
    """Return the total of each spot, float64 (n_spots,)."""
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def spread(values: np.ndarray) -> float:
    """Return the distance between the 10th and the 90th percentile of values above 0, divided by their median; NaN if too few."""
    values = values[values > 0]
    if len(values) < MIN_SPOTS:
        return float("nan")
    low, middle, high = np.percentile(values, (10, 50, 90))
    return float((high - low) / middle)


def share_without_ones(counts: sparse.csr_matrix) -> float:
    """Return the share of judged spots whose smallest value above 0 exceeds 1 and is the most frequent value in the spot.

    It must be at least :data:`SHARE_OF_ONES` of the values. Spots with fewer than ``MIN_DETECTED`` genes are not judged; NaN if
    fewer than ``MIN_SPOTS`` are judged.
    """
    without, judged = 0, 0
    for start, end in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        values = counts.data[start:end]
        values = values[values > 0]
        if len(values) < MIN_DETECTED:
            continue
        judged += 1
        smallest = values.min()
        if smallest > 1:
            _, times = np.unique(values, return_counts=True)
            without += int(times[0] == times.max() and times[0] >= SHARE_OF_ONES * len(values))
    return without / judged if judged >= MIN_SPOTS else float("nan")


def scaled_total(counts: sparse.csr_matrix) -> float | None:
    """Return the total to which all spots were scaled before rounding, or None if these may be raw counts.

    Parameters
    ----------
    counts
        Non-negative integers, (n_spots, n_genes).
    """
    totals = totals_of(counts)
    if not spread(totals) < SPREAD_SCALED or not share_without_ones(counts) > SHARE_WITHOUT_ONES:
        return None
    return float(np.median(totals[totals > 0]))


def not_raw(total: float) -> str:
    """Return why counts with this :func:`scaled_total` are not raw, for messages."""
    return (
        f"every spot sums to about {total:,.0f}, and in many spots the smallest value is also the most frequent one, but not 1: "
        "these are normalised values that were rounded to integers, not raw counts"
    )
