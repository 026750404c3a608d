"""Discretisation of expression into levels; edges and level values are fitted on the training split only.

A value is log1p of counts scaled to 10,000 per spot. Level 0 is count 0. Positive values have levels 1 to Q - 1, separated by
Q - 2 edges: quantiles of the training split's positive values, without duplicates. The table belongs to the model and is saved
with the export, not with the shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from comtip_fast.config.schema import LevelsConfig

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
    """Edges and values of Q levels in R rows: one row per trained gene, and a last, global row for all other genes."""

    edges: FloatArray
    """float32 (R, Q - 2), lower edges of levels 2 to Q - 1 in log1p CP10K; unused edges are +inf."""
    value_cp10k: FloatArray
    """float32 (R, Q), value of each level in log1p CP10K: the median of its training values, 0 for level 0."""
    value_raw: FloatArray
    """float32 (R, Q), value of each level in log1p raw counts."""
    log_prior: FloatArray
    """float32 (R, Q), log frequency of each level."""

    @property
    def n_levels(self) -> int:
        """Number of levels, Q."""
        return int(self.value_cp10k.shape[1])

    def levels(self, values_NG: np.ndarray, rows_G: np.ndarray) -> np.ndarray:
        """Return the level of each value, uint8 (N, G); column j uses row ``rows_G[j]`` of the table."""
        edges_GE = self.edges[rows_G]
        out = (values_NG > 0).astype(np.uint8)
        for e in range(edges_GE.shape[1]):  # one edge at a time: all at once needs Q times the memory
            out += (values_NG >= edges_GE[:, e]) & (values_NG > 0)
        return out

    def between(self, value: float, row: int) -> tuple[int, int, float]:
        """Return (lower level, upper level, weight of the upper level), which interpolate to a log1p CP10K value in ``row``."""
        values = self.value_cp10k[row]
        hi = int(np.clip(np.searchsorted(values, value), 1, self.n_levels - 1))
        lo = hi - 1
        gap = float(values[hi] - values[lo])
        mix = 0.0 if gap <= 0 else float(np.clip((value - values[lo]) / gap, 0, 1))
        return lo, hi, mix

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays to save, contiguous float32, by field name."""
        return {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in vars(self).items()}


def fit_levels(
    values: sparse.csc_matrix, raw: sparse.csc_matrix, measured_NG: np.ndarray, config: LevelsConfig
) -> LevelTable:
    """Fit a level table on training spots.

    Parameters
    ----------
    values, raw
        (N, G) log1p CP10K and log1p raw counts of the training spots, CSC.
    measured_NG
        bool (N, G): whether the spot's section measured the gene.
    config
        ``kind``, ``n_levels`` and ``min_positive`` are read.
    """
    Q, G = config.n_levels, values.shape[1]
    table = LevelTable(
        np.full((G + 1, Q - 2), np.inf, np.float32),
        np.zeros((G + 1, Q), np.float32),
        np.zeros((G + 1, Q), np.float32),
        np.zeros((G + 1, Q), np.float32),
    )
    n_measured = measured_NG.sum(0)
    _fit_row(table, G, values.data, raw.data, n_zero=int(n_measured.sum()) - values.nnz, edges=None)
    for g in range(G):
        column = slice(values.indptr[g], values.indptr[g + 1])
        positive = values.data[column]
        n_zero = int(n_measured[g]) - positive.size
        own_edges = config.kind == "per_gene" and positive.size >= config.min_positive
        _fit_row(table, g, positive, raw.data[column], n_zero=n_zero, edges=None if own_edges else table.edges[G])
    return table


def _fit_row(
    table: LevelTable,
    row: int,
    positive: np.ndarray,
    raw: np.ndarray,
    *,
    n_zero: int,
    edges: np.ndarray | None,
) -> None:
    """Fill one row of the table; a level with too few values gets the value of the global row."""
    Q = table.n_levels
    if edges is None:
        cuts = np.quantile(positive, np.arange(1, Q - 1) / (Q - 1)) if positive.size else np.zeros(0)
        # An edge equal to the smallest value would leave level 1 empty; duplicate edges would leave other levels empty.
        cuts = np.unique(cuts[cuts > positive.min()]) if positive.size else cuts
        edges = np.full(Q - 2, np.inf, np.float32)
        edges[: cuts.size] = cuts
    table.edges[row] = edges
    level = (positive[:, None] >= edges[None]).sum(1) + 1
    count = np.bincount(level, minlength=Q).astype(np.float64)
    count[0] = n_zero
    table.log_prior[row] = np.log((count + 0.5) / (count.sum() + 0.5 * Q))
    for q in range(1, Q):
        inside = level == q
        enough = inside.sum() >= (1 if row == table.edges.shape[0] - 1 else 3)
        table.value_cp10k[row, q] = np.median(positive[inside]) if enough else table.value_cp10k[-1, q]
        table.value_raw[row, q] = np.median(raw[inside]) if enough else table.value_raw[-1, q]
