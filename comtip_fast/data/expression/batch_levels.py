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
    spot, column, values = _selected_values(csr, tables.genes.trained[panel], tables.n_genes)
    out = np.zeros((csr[0].size - 1, panel.size), np.uint8)
    out[spot, column] = tables.table.levels_of_entries(values, column, panel)
    return out


def _selected_values(csr: Csr, genes: np.ndarray, n_genes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the counts of the given genes as log1p CP10K, bit-identical to :func:`.levels.log1p_cp10k`.

    Parameters
    ----------
    csr
        All counts of b spots.
    genes
        (G,) distinct rows of the gene table.
    n_genes
        Number of rows of the gene table.

    Returns
    -------
    spot, column, values
        Of each count of the genes: the spot, the index in ``genes``, and the value, float32.
    """
    indptr, rows, counts = csr
    total = np.add.reduceat(np.append(counts, np.int32(0)), indptr[:-1], dtype=np.int64)
    total[indptr[1:] == indptr[:-1]] = 0  # for an empty row, reduceat returns the next element
    scale = 1e4 / np.maximum(total.astype(np.float64), 1.0)
    column_of_gene = np.full(n_genes, -1, np.int32)
    column_of_gene[genes] = np.arange(genes.size)
    column = column_of_gene[rows]
    selected = np.flatnonzero(column >= 0)
    spot = np.searchsorted(indptr, selected, side="right") - 1
    return spot, column[selected], np.log1p((scale[spot] * counts[selected]).astype(np.float32))
