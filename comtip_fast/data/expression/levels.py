"""Discretisation of expression into levels; edges and level values are fitted on the training split only.

A value is log1p of counts scaled to 10,000 per spot. Level 0 is count 0. Positive values have levels 1 to Q - 1, separated by
Q - 2 edges: quantiles of the training split's positive values, without duplicates. The table belongs to the model and is saved
with the export, not with the shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

FloatArray = np.ndarray


def log1p_cp10k(counts: sparse.csr_matrix, totals: np.ndarray | None = None) -> sparse.csr_matrix:
    """Return log1p of counts per 10,000 as float32 CSR; ``totals`` (n_spots,) are total counts, by default the row sums."""
    total = np.asarray(counts.sum(axis=1)).ravel() if totals is None else totals
    scaled = sparse.diags(1e4 / np.maximum(total, 1.0)) @ counts.astype(np.float64)
    out = sparse.csr_matrix(scaled, dtype=np.float32)
    out.data = np.log1p(out.data)
    return out


@dataclass
class LevelTable:
    """Edges and values of the Q expression levels, in R rows: one per trained gene, and a last, global row for all other genes."""

    edges: FloatArray
    """float32 (R, Q - 2), lower edges of levels 2 to Q - 1 in log1p CP10K; unused edges are +inf."""
    value_cp10k: FloatArray
    """float32 (R, Q), value of each level in log1p CP10K; 0 for level 0, and for a level without any training value.

    A value is the median of the level's training values; if a gene has fewer than 3 values in a level, the value of the global row
    is used.
    """
    value_raw: FloatArray
    """float32 (R, Q), value of each level in log1p raw counts, computed from the same training values as ``value_cp10k``."""
    log_prior: FloatArray
    """float32 (R, Q), log of the smoothed frequency of each level."""

    @property
    def n_levels(self) -> int:
        """Number of levels, Q."""
        return int(self.value_cp10k.shape[1])

    def levels(self, values_NG: np.ndarray, rows_G: np.ndarray) -> np.ndarray:
        """Return the level of each value in log1p CP10K, uint8 (N, G); column j uses row ``rows_G[j]`` of the table."""
        edges_GE = self.edges[rows_G]
        out = (values_NG > 0).astype(np.uint8)
        for e in range(edges_GE.shape[1]):  # one edge at a time: all at once needs Q times the memory
            out += (values_NG >= edges_GE[:, e]) & (values_NG > 0)
        return out

    def levels_of_entries(self, values_n: np.ndarray, column_n: np.ndarray, rows_G: np.ndarray) -> np.ndarray:
        """Return the level of n entries of a sparse matrix, uint8 (n,); as :meth:`levels`, entry i is in column ``column_n[i]``."""
        positive = values_n > 0
        out = positive.astype(np.uint8)
        if not positive.all():
            values_n = np.where(positive, values_n, -np.inf)
        for edges_G in np.ascontiguousarray(self.edges[rows_G].T):
            out += values_n >= edges_G.take(column_n)
        return out

    def between(self, value: float, row: int) -> tuple[int, int, float]:
        """Return the two levels of table row ``row`` between which a log1p CP10K value lies, and the weight of the upper one.

        The weight is clipped to [0, 1]: a value above all levels is represented by the highest level.
        """
        values = self.value_cp10k[row]
        hi = int(np.clip(np.searchsorted(values, value), 1, self.n_levels - 1))
        lo = hi - 1
        gap = float(values[hi] - values[lo])
        mix = 0.0 if gap <= 0 else float(np.clip((value - values[lo]) / gap, 0, 1))
        return lo, hi, mix

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays to save, contiguous float32, by field name."""
        return {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in vars(self).items()}
