"""Levels of a batch: rows of the table where that fits into memory, else from the records, without a loop over spots."""

from __future__ import annotations

import numpy as np

from comtip_fast.data.expression.training_tables import TrainingTables
from comtip_fast.data.records import Csr


def levels_from_table(tables: TrainingTables, spots: np.ndarray, panel: np.ndarray) -> np.ndarray:
    """Return uint8 (b, G); ``panel`` (G,) holds positions among the trained genes."""
    assert tables.levels is not None
    return tables.levels[np.searchsorted(tables.spots, spots)][:, panel]


def levels_from_counts(tables: TrainingTables, csr: Csr, panel: np.ndarray) -> np.ndarray:
    """Return uint8 (b, G) from all counts of b spots; ``panel`` (G,) holds positions among the trained genes."""
    values = dense_values(csr, tables.genes.trained[panel], tables.n_genes)
    return tables.table.levels(values, panel)


def dense_values(csr: Csr, genes: np.ndarray, n_genes: int) -> np.ndarray:
    """Return log1p CP10K of some genes: float32 (b, G), to the bit what ``log1p_cp10k`` gives.

    Parameters
    ----------
    csr
        All counts of b spots.
    genes
        (G,) rows of the gene table, each once.
    n_genes
        Rows of the gene table.
    """
    indptr, rows, counts = csr
    n = indptr.size - 1
    total = np.add.reduceat(np.append(counts, np.int32(0)), indptr[:-1], dtype=np.int64)
    total[indptr[1:] == indptr[:-1]] = 0  # where there is nothing to add, reduceat returns what comes next
    scale = 1e4 / np.maximum(total.astype(np.float64), 1.0)
    place = np.full(n_genes, -1, np.int32)
    place[genes] = np.arange(genes.size)
    column = place[rows]
    wanted = np.flatnonzero(column >= 0)
    spot = np.searchsorted(indptr, wanted, side="right") - 1
    out = np.zeros((n, genes.size), np.float32)
    out[spot, column[wanted]] = np.log1p((scale[spot] * counts[wanted]).astype(np.float32))
    return out
