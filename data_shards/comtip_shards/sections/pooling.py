"""Pool bins, cells and transcripts to square pseudo-spots of a chosen width.

Measurements finer than a spot (*units*) are summed in the squares of a grid. The result does not depend on the order of the
units. Squares with too few units are left out, and their content is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from comtip_shards.errors import SourceError

_COMPACT = 1 << 23
"""Maximum number of buffered entries before they are summed: about 128 MiB."""
_LIMIT = 1 << 30
"""Bound on the column and row of a square, so that both fit into one int64."""


@dataclass(frozen=True)
class Pooled:
    """Squares with enough units, ordered by row and then by column, and totals of the dropped squares."""

    square_N2: np.ndarray
    """int64 (N, 2), column (x) and row (y) in the grid: square (i, j) covers x from i to i + 1 widths."""
    counts: sparse.csr_matrix
    """int32 (N, genes)."""
    n_units: np.ndarray
    """int64 (N,), units in each square."""
    dropped_squares: int
    """Number of squares with too few units."""
    dropped_units: int
    """Number of units in the dropped squares."""
    dropped_counts: int
    """Sum of the counts in the dropped squares."""

    def ids(self) -> list[str]:
        """Return the name of each square, row and column in at least three digits: ``003x012``."""
        return [f"{j:03d}x{i:03d}" for i, j in self.square_N2]


def squares_of(xy_N2: np.ndarray, width: float, where: str) -> np.ndarray:
    """Return the square that contains each position.

    Parameters
    ----------
    xy_N2
        float (N, 2), finite, in the unit of ``width``.
    width
        Width of a square.
    where
        File of the positions, for messages.

    Returns
    -------
    int64 (N, 2), such that ``square * width <= xy < (square + 1) * width`` in float64.

    Raises
    ------
    SourceError
        A position is 2^30 squares or more away from the origin.
    """
    xy = np.asarray(xy_N2, np.float64)
    index = np.floor(xy / width)
    # The quotient is rounded, so a position just below an edge may be assigned to the next square, and vice versa.
    index -= index * width > xy
    index += (index + 1) * width <= xy
    _check_near(index, where)
    return index.astype(np.int64)


class Pooler:
    """Sums units in squares, batch by batch.

    Its methods raise :class:`SourceError` for a square 2^30 squares or more away from the origin.

    Parameters
    ----------
    n_genes
        Number of genes.
    where
        File of the units, for messages.
    """

    def __init__(self, n_genes: int, where: str) -> None:
        self.n_genes, self.where = n_genes, where
        self.total_units = 0
        self.total_counts = 0
        self._row_of: dict[int, int] = {}
        self._units = np.zeros(0, np.int64)
        self._flat: list[np.ndarray] = []
        self._data: list[np.ndarray] = []
        self._buffered = 0

    @property
    def units(self) -> np.ndarray:
        """Number of bins or cells added to each square so far, int64; the squares are in no particular order."""
        return self._units

    def add_units(self, square_N2: np.ndarray) -> None:
        """Count one unit in each of these squares, int64 (N, 2); squares may be repeated."""
        self._count(self._rows(square_N2))

    def add_counts(self, square_N2: np.ndarray, counts: sparse.csr_matrix) -> None:
        """Add row i of ``counts``, integers (N, genes), to square i of ``square_N2``, int64 (N, 2); adds no units."""
        rows = self._rows(square_N2)
        coo = counts.tocoo()
        self._add(rows[coo.row], coo.col.astype(np.int64), coo.data.astype(np.int64))

    def add_transcripts(self, square_N2: np.ndarray, gene_N: np.ndarray) -> None:
        """Add one unit with one count of gene ``gene_N[i]`` (index) to each square i of ``square_N2``, int64 (N, 2)."""
        rows = self._rows(square_N2)
        self._count(rows)
        self._add(rows, np.asarray(gene_N, np.int64), np.ones(len(gene_N), np.int64))

    def _count(self, rows: np.ndarray) -> None:
        self._units += np.bincount(rows, minlength=len(self._units))
        self.total_units += len(rows)

    def _add(self, rows: np.ndarray, genes: np.ndarray, data: np.ndarray) -> None:
        self.total_counts += int(data.sum())
        self._flat.append(rows * self.n_genes + genes)
        self._data.append(data)
        self._buffered += len(data)
        if self._buffered > _COMPACT:
            self._compact()

    def result(self, *, min_units: int = 1) -> Pooled:
        """Return the squares with at least ``min_units`` units.

        Raises
        ------
        SourceError
            A sum exceeds 2^31 - 1.
        """
        self._compact()
        flat, data = self._flat[0], self._data[0]
        if data.size and data.max() > np.iinfo(np.int32).max:
            raise SourceError(
                f"{self.where}: a pseudo-spot has more than 2^31 - 1 counts of one gene; set a smaller `pool_um`"
            )
        shape = (len(self._units), self.n_genes)
        whole = sparse.csr_matrix((data, (flat // self.n_genes, flat % self.n_genes)), shape=shape)
        squares = _decode(np.array(list(self._row_of), np.int64))
        order = np.lexsort((squares[:, 0], squares[:, 1]))
        kept = order[self._units[order] >= min_units]
        counts = whole[kept].astype(np.int32)
        counts.eliminate_zeros()
        counts.sort_indices()
        return Pooled(
            squares[kept],
            counts,
            self._units[kept],
            len(self._units) - len(kept),
            self.total_units - int(self._units[kept].sum()),
            self.total_counts - int(counts.sum(dtype=np.int64)),
        )

    def _rows(self, square_N2: np.ndarray) -> np.ndarray:
        """Return the row of each square, adding rows for new squares."""
        codes, inverse = np.unique(_encode(square_N2, self.where), return_inverse=True)
        for code in codes.tolist():
            self._row_of.setdefault(code, len(self._row_of))
        new = len(self._row_of) - len(self._units)
        if new:
            self._units = np.concatenate([self._units, np.zeros(new, np.int64)])
        return np.array([self._row_of[c] for c in codes.tolist()], np.int64)[inverse]

    def _compact(self) -> None:
        flat = np.concatenate(self._flat) if self._flat else np.zeros(0, np.int64)
        data = np.concatenate(self._data) if self._data else np.zeros(0, np.int64)
        order = np.argsort(flat, kind="stable")
        flat, data = flat[order], data[order]
        first = np.flatnonzero(np.r_[True, flat[1:] != flat[:-1]]) if flat.size else np.zeros(0, np.int64)
        self._flat = [flat[first]]
        self._data = [np.add.reduceat(data, first) if flat.size else data]
        self._buffered = len(first)


def _encode(square_N2: np.ndarray, where: str) -> np.ndarray:
    squares = np.asarray(square_N2, np.int64)
    _check_near(squares, where)
    return squares[:, 0] * (2 * _LIMIT) + squares[:, 1]


def _check_near(squares: np.ndarray, where: str) -> None:
    if squares.size and not np.abs(squares).max() < _LIMIT:
        raise SourceError(
            f"{where}: a position is {np.abs(squares).max():.3g} pseudo-spots away from the origin; check the positions, their unit and "
            "the scale"
        )


def _decode(codes: np.ndarray) -> np.ndarray:
    column = (codes + _LIMIT) // (2 * _LIMIT)
    return np.stack([column, codes - column * (2 * _LIMIT)], axis=1)
