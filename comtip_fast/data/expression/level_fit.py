"""Fit a level table on a sample of training spots, in memory that grows with the number of positive counts of the sample.

The sample keeps the counts of the trained genes by gene, in about 4 bytes per positive count. log1p CP10K is computed for one gene
at a time, whenever it is needed; the fit also holds one float32 array of all positive values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy import sparse

from comtip_fast.config.schema import LevelsConfig
from comtip_fast.data.expression.levels import LevelTable

CHUNK = 4096
"""Largest number of spots that :meth:`CountSample.add` takes: row numbers within a chunk are uint16."""


class GeneColumns(Protocol):
    """Positive values of each gene."""

    n_genes: int
    """Number of genes, G."""
    nnz: int
    """Number of positive values of all genes."""

    def column(self, gene: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the positive log1p CP10K of a gene and the log1p raw counts of the same spots, both float32."""
        ...


@dataclass
class _Chunk:
    """Positive counts of some spots by gene (compressed sparse columns)."""

    indptr: np.ndarray
    rows: np.ndarray
    """uint16, indices of the spots in the chunk."""
    counts: np.ndarray
    """Counts in the smallest unsigned type that holds all of them."""


@dataclass
class CountSample:
    """Raw counts of N spots for G genes, by gene.

    Parameters
    ----------
    n_genes
        Number of genes, G.
    """

    n_genes: int
    nnz: int = 0
    """Number of positive counts."""
    _chunks: list[_Chunk] = field(default_factory=list)
    _scale: list[np.ndarray] = field(default_factory=list)
    """For each chunk, the factor from counts to CP10K of each spot."""

    @property
    def n_spots(self) -> int:
        """Number of spots, N."""
        return sum(s.size for s in self._scale)

    def add(self, counts: sparse.csr_matrix, genes: np.ndarray) -> None:
        """Add the counts, (n, genes of the set), of up to ``CHUNK`` spots; only the columns ``genes`` (G,) are kept."""
        own = counts[:, genes].tocsc()
        own.sort_indices()
        self.nnz += own.nnz
        smallest = np.min_scalar_type(int(own.data.max(initial=0)))
        self._chunks.append(_Chunk(own.indptr, own.indices.astype(np.uint16), own.data.astype(smallest)))
        total = np.asarray(counts.sum(axis=1)).ravel()
        self._scale.append(1e4 / np.maximum(total, 1.0))

    def entries(self, gene: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a gene's positive log1p CP10K, log1p raw counts (float32), and the indices of their spots in the sample."""
        values, raw, spots, first = [], [], [], 0
        for chunk, scale in zip(self._chunks, self._scale, strict=True):
            own = slice(chunk.indptr[gene], chunk.indptr[gene + 1])
            rows, counts = chunk.rows[own].astype(np.int64), chunk.counts[own].astype(np.float64)
            # The arithmetic of `log1p_cp10k`, so that levels do not depend on who computed a value.
            values.append(np.log1p((scale[rows] * counts).astype(np.float32)))
            raw.append(np.log1p(counts.astype(np.float32)))
            spots.append(rows + first)
            first += scale.size
        return np.concatenate(values), np.concatenate(raw), np.concatenate(spots)

    def column(self, gene: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the positive log1p CP10K of a gene and the log1p raw counts of the same spots, both float32."""
        values, raw, _ = self.entries(gene)
        return values, raw

    def levels(self, table: LevelTable) -> np.ndarray:
        """Return the levels of all spots, uint8 (N, G)."""
        out = np.zeros((self.n_spots, self.n_genes), np.uint8)
        for gene, spots, level in self._gene_levels(table):
            out[spots, gene] = level
        return out

    def level_means(self, table: LevelTable, section_N: np.ndarray, n_sections: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean level and the detection rate of each gene in each section, float64 (S, G) each.

        Both are means over the spots of the sample, and 0 for a section without spots.

        Parameters
        ----------
        table
            Fitted levels.
        section_N
            int64 (N,), section of each spot of the sample.
        n_sections
            Number of sections, S.
        """
        mean, detection = np.zeros((n_sections, self.n_genes)), np.zeros((n_sections, self.n_genes))
        for gene, spots, level in self._gene_levels(table):
            section = section_N[spots]
            mean[:, gene] = np.bincount(section, level, n_sections)
            detection[:, gene] = np.bincount(section, minlength=n_sections)
        n_spots = np.maximum(np.bincount(section_N, minlength=n_sections), 1)[:, None]
        return mean / n_spots, detection / n_spots

    def _gene_levels(self, table: LevelTable) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield each gene, its spots with a positive count, and their levels."""
        for gene in range(self.n_genes):
            values, _, spots = self.entries(gene)
            yield gene, spots, _level(values, table.edges[gene])


def fit_levels(columns: GeneColumns, n_measured_G: np.ndarray, config: LevelsConfig) -> LevelTable:
    """Fit a level table on training spots.

    Parameters
    ----------
    columns
        Positive values of G genes in the spots of the sample.
    n_measured_G
        int64 (G,), number of spots of the sample whose section measured the gene.
    config
        Kind, Q, and the number of positive values below which a gene uses the global edges.
    """
    Q, G = config.n_levels, columns.n_genes
    table = LevelTable(
        np.full((G + 1, Q - 2), np.inf, np.float32),
        np.zeros((G + 1, Q), np.float32),
        np.zeros((G + 1, Q), np.float32),
        np.zeros((G + 1, Q), np.float32),
    )
    _fit_global(table, columns, n_zero=int(n_measured_G.sum()) - columns.nnz)
    for g in range(G):
        positive, raw = columns.column(g)
        own_edges = config.kind == "per_gene" and positive.size >= config.min_positive
        table.edges[g] = _edges(positive.copy(), Q) if own_edges else table.edges[G]
        level = _level(positive, table.edges[g])
        _set_prior(table, g, np.bincount(level, minlength=Q), int(n_measured_G[g]) - positive.size)
        for q in range(1, Q):
            inside = level == q
            if inside.sum() >= 3:
                table.value_cp10k[g, q] = np.median(positive[inside])
                table.value_raw[g, q] = np.median(raw[inside])
            else:
                table.value_cp10k[g, q], table.value_raw[g, q] = table.value_cp10k[G, q], table.value_raw[G, q]
    return table


def _fit_global(table: LevelTable, columns: GeneColumns, n_zero: int) -> None:
    """Fill the last row, which describes all genes together; at most one array of all positive values is in memory at a time."""
    Q, G = table.n_levels, columns.n_genes
    values = np.empty(columns.nnz, np.float32)
    end = 0
    for g in range(G):
        own, _ = columns.column(g)
        values[end : end + own.size] = own
        end += own.size
    table.edges[G] = _edges(values, Q)
    values.sort()
    first = np.searchsorted(values, table.edges[G], side="left")
    bounds = np.concatenate([[0, 0], first, [values.size]])  # level q has the sorted values bounds[q] to bounds[q + 1]
    for q in range(1, Q):
        if bounds[q] < bounds[q + 1]:
            table.value_cp10k[G, q] = np.median(values[bounds[q] : bounds[q + 1]])
    _set_prior(table, G, np.diff(bounds), n_zero)
    del values
    by_level, filled = np.empty(columns.nnz, np.float32), bounds[:-1].copy()
    for g in range(G):
        own, raw = columns.column(g)
        level = _level(own, table.edges[G])
        for q in range(1, Q):
            inside = raw[level == q]
            by_level[filled[q] : filled[q] + inside.size] = inside
            filled[q] += inside.size
    for q in range(1, Q):
        if bounds[q] < bounds[q + 1]:
            table.value_raw[G, q] = np.median(by_level[bounds[q] : bounds[q + 1]], overwrite_input=True)


def _edges(positive: np.ndarray, n_levels: int) -> np.ndarray:
    """Return the Q-2 edges of positive values: quantiles without duplicates, then +inf. Reorders ``positive``."""
    edges = np.full(n_levels - 2, np.inf, np.float32)
    if positive.size:
        cuts = np.quantile(positive, np.arange(1, n_levels - 1) / (n_levels - 1), overwrite_input=True)
        # An edge equal to the smallest value would leave level 1 empty; duplicate edges would leave other levels empty.
        cuts = np.unique(cuts[cuts > positive.min()])
        edges[: cuts.size] = cuts
    return edges


def _level(positive: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the levels of positive values, int64: 1 plus the number of edges at or below the value."""
    out: np.ndarray = np.searchsorted(edges, positive, side="right") + 1
    return out


def _set_prior(table: LevelTable, row: int, n_level: np.ndarray, n_zero: int) -> None:
    """Set the log frequencies of a row, smoothed by half a value per level.

    ``n_level`` (Q,) has the number of values of each level; ``n_zero``, the number of zeros, replaces the first entry.
    """
    count = n_level.astype(np.float64)
    count[0] = n_zero
    table.log_prior[row] = np.log((count + 0.5) / (count.sum() + 0.5 * table.n_levels))
