"""Expression levels of a batch, from the in-memory table if there is one, and otherwise from the batch's records."""

from __future__ import annotations

import numpy as np

from comtip_fast.data.expression.training_tables import TrainingTables
from comtip_fast.data.records import Csr


def levels_from_table(tables: TrainingTables, spots: np.ndarray, panel: np.ndarray) -> np.ndarray:
    """Return the levels of b spots, uint8 (b, G), from the in-memory table; ``panel`` (G,) has indices into the trained genes."""
    assert tables.levels is not None
    return tables.levels[np.searchsorted(tables.spots, spots)][:, panel]


def levels_from_counts(tables: TrainingTables, csr: Csr, panel: np.ndarray) -> np.ndarray:
    """Return the levels of b spots, uint8 (b, G), from all their counts; ``panel`` (G,) has indices into the trained genes."""
    values = dense_values(csr, tables.genes.trained[panel], tables.n_genes)
    return tables.table.levels(values, panel)


def dense_values(csr: Csr, genes: np.ndarray, n_genes: int) -> np.ndarray:
    """Return log1p CP10K of the given genes, float32 (b, G), bit-identical to :func:`.levels.log1p_cp10k`.

    Parameters
    ----------
    csr
        All counts of b spots.
    genes
        (G,) distinct rows of the gene table.
    n_genes
        Number of rows of the gene table.
    """
    indptr, rows, counts = csr
    n = indptr.size - 1
    total = np.add.reduceat(np.append(counts, np.int32(0)), indptr[:-1], dtype=np.int64)
    total[indptr[1:] == indptr[:-1]] = 0  # for an empty row, reduceat returns the next element
    scale = 1e4 / np.maximum(total.astype(np.float64), 1.0)
    column_of_gene = np.full(n_genes, -1, np.int32)
    column_of_gene[genes] = np.arange(genes.size)
    column = column_of_gene[rows]
    selected = np.flatnonzero(column >= 0)
    spot = np.searchsorted(indptr, selected, side="right") - 1
    out = np.zeros((n, genes.size), np.float32)
    out[spot, column[selected]] = np.log1p((scale[spot] * counts[selected]).astype(np.float32))
    return out
