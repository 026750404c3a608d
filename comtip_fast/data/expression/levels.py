"""Expression values as levels: edges and values, learnt from the training split only.

A value is log1p of counts scaled to 10,000 per spot. Level 0 is count 0; positive values take levels 1 to Q-1
by Q-2 interior edges (quantiles of the training split's positive values, ties removed). The table belongs to
the model: it is saved with the checkpoint and never with the shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from comtip_fast.config.schema import LevelsConfig

FloatArray = np.ndarray


def log1p_cp10k(counts: sparse.csr_matrix, totals: np.ndarray | None = None) -> sparse.csr_matrix:
    """Return log1p of counts per 10,000 as CSR float32; ``totals`` (n_spots,) defaults to the row sums."""
    total = np.asarray(counts.sum(axis=1)).ravel() if totals is None else totals
    scaled = sparse.diags(1e4 / np.maximum(total, 1.0)) @ counts.astype(np.float64)
    out = sparse.csr_matrix(scaled, dtype=np.float32)
    out.data = np.log1p(out.data)
    return out


@dataclass
class LevelTable:
    """Edges and values of Q levels, per gene of the gene list it was fitted on; one further row is global.

    ``edges`` (R, Q-2) float32, unused edges +inf; ``value_cp10k`` and ``value_raw`` (R, Q) float32 are the
    level's value in log1p CP10K and in log1p raw counts; ``log_prior`` (R, Q) is the log frequency of each
    level. Row i belongs to gene i, the last row is the global one, for genes that training did not see.
    """

    edges: FloatArray
    value_cp10k: FloatArray
    value_raw: FloatArray
    log_prior: FloatArray

    @property
    def n_levels(self) -> int:
        """Q."""
        return int(self.value_cp10k.shape[1])

    def levels(self, values_NG: np.ndarray, rows_G: np.ndarray) -> np.ndarray:
        """Return the level of each value: uint8 (N, G); column j uses row ``rows_G[j]``."""
        edges_GE = self.edges[rows_G]
        out = (values_NG > 0).astype(np.uint8)
        for e in range(edges_GE.shape[1]):  # an edge at a time: all at once would need Q times the memory
            out += (values_NG >= edges_GE[:, e]) & (values_NG > 0)
        return out

    def between(self, value: float, row: int) -> tuple[int, int, float]:
        """Return (lower level, upper level, share of the upper) of a query value, for a mixed level row."""
        values = self.value_cp10k[row]
        hi = int(np.clip(np.searchsorted(values, value), 1, self.n_levels - 1))
        lo = hi - 1
        gap = float(values[hi] - values[lo])
        mix = 0.0 if gap <= 0 else float(np.clip((value - values[lo]) / gap, 0, 1))
        return lo, hi, mix

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays to save."""
        return {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in vars(self).items()}


def fit_levels(
    values: sparse.csc_matrix, raw: sparse.csc_matrix, measured_NG: np.ndarray, config: LevelsConfig
) -> LevelTable:
    """Learn a level table from training spots.

    Parameters
    ----------
    values, raw
        (N, G) log1p CP10K and log1p raw counts of the training spots, sparse by column.
    measured_NG
        bool (N, G), where the spot's section measured the gene.
    config
        Kind, Q, and the positives below which a gene falls back to the global row.
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
        part = slice(values.indptr[g], values.indptr[g + 1])
        positive = values.data[part]
        n_zero = int(n_measured[g]) - positive.size
        own = config.kind == "per_gene" and positive.size >= config.min_positive
        _fit_row(table, g, positive, raw.data[part], n_zero=n_zero, edges=None if own else table.edges[G])
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
    """Fill one row; bins that hold too few values borrow the global row's value."""
    Q = table.n_levels
    if edges is None:
        cuts = np.quantile(positive, np.arange(1, Q - 1) / (Q - 1)) if positive.size else np.zeros(0)
        # An edge equal to the smallest value would leave level 1 empty; equal edges would leave others empty.
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
