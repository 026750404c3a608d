"""Section statistics for the readout: moments, which can be accumulated over parts, and means over neighbours.

Shapes: N spots, n of them in a part, F features, k candidate neighbours, M spots that include the neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

ADJACENT = 1.3
"""Radius, as a multiple of the median distance to the nearest spot, within which spots of a lattice are adjacent: at most 6 of them."""
MIN_SECTION_SPOTS = 20
"""Sections with fewer spots are standardised with the mean and standard deviation of training."""
QUERY_ROWS = 16_384
"""Number of spots whose neighbours are searched at once."""


def most_neighbours(radius: float) -> int:
    """Return the largest number of neighbours within ``radius`` spacings: 6 if they are adjacent, 46 within 3.4 spacings.

    A lattice has about as many spots. Cells that lie more densely at some positions than at others have only the nearest.
    """
    return int(4 * radius**2)


class Neighbours:
    """Neighbour search among N >= 2 spots, for some rows at a time.

    Parameters
    ----------
    xy_N2
        Positions in any unit.
    radii
        Distances within which spots are neighbours, as multiples of the spacing; at least one.
    """

    def __init__(self, xy_N2: np.ndarray, radii: Sequence[float] = (ADJACENT,)) -> None:
        self._xy, self.radii = np.asarray(xy_N2, np.float64), tuple(radii)
        self._tree = cKDTree(self._xy)
        nearest = np.empty(len(self._xy))
        for start in range(0, len(nearest), QUERY_ROWS):
            part = slice(start, start + QUERY_ROWS)
            nearest[part] = self._tree.query(self._xy[part], k=2)[0][:, 1]
        self.spacing = float(np.median(nearest))
        """Median distance to the nearest spot."""

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Find the neighbours of the n spots ``rows``.

        Returns
        -------
        index, near
            Candidates, nearest first, int64 (n, k); and, for each radius, which of the candidates are neighbours, bool (n, k).
        """
        k = min(most_neighbours(max(self.radii)) + 1, len(self._xy))
        distance, index = self._tree.query(self._xy[rows], k=k)
        other = index != rows[:, None]
        rank = np.cumsum(other, axis=1)  # the spot itself is not the first of several spots at its position
        return index, [
            other & (distance <= radius * self.spacing) & (rank <= most_neighbours(radius)) for radius in self.radii
        ]


def mean_over(own_nF: np.ndarray, all_MF: np.ndarray, index_nk: np.ndarray, near_nk: np.ndarray) -> np.ndarray:
    """Return the mean of ``all_MF[index_nk]`` over neighbours (``near_nk``); a spot without neighbours keeps its ``own_nF`` row."""
    count = near_nk.sum(1)
    ends = np.concatenate([[0], np.cumsum(count)])
    chosen = sparse.csr_matrix(
        (np.ones(ends[-1], all_MF.dtype), index_nk[near_nk], ends), shape=(len(index_nk), len(all_MF))
    )
    mean = chosen @ all_MF / np.maximum(count, 1)[:, None].astype(all_MF.dtype)
    return np.where(count[:, None] > 0, mean, own_nF)


def neighbour_mean(x_NF: np.ndarray, xy_N2: np.ndarray) -> np.ndarray:
    """Return the mean of ``x_NF`` over each spot's adjacent spots, (N, F); a spot without neighbours keeps its own row."""
    return neighbour_means(x_NF, xy_N2, (ADJACENT,))[0]


def neighbour_means(x_NF: np.ndarray, xy_N2: np.ndarray, radii: Sequence[float]) -> list[np.ndarray]:
    """Return the mean of ``x_NF`` over each spot's neighbours within each of ``radii``, as (N, F) arrays.

    A spot without neighbours keeps its own row. Radii are multiples of the spacing, see :class:`Neighbours`.
    """
    if len(x_NF) < 2 or not radii:
        return [x_NF for _ in radii]
    index, near = Neighbours(xy_N2, radii).of(np.arange(len(x_NF)))
    return [mean_over(x_NF, x_NF, index, of_radius) for of_radius in near]


@dataclass
class Moments:
    """Number, mean and standard deviation of a section's features, accumulated over parts of the section."""

    n: int = 0
    mean_F: np.ndarray | float = 0.0
    square_F: np.ndarray | float = 0.0
    """Sum of squared deviations from the mean."""

    def add(self, x_NF: np.ndarray) -> None:
        """Add the features of some spots (the pairwise update of Chan, Golub and LeVeque)."""
        x = np.asarray(x_NF, np.float64)
        if not len(x):
            return
        mean, total = x.mean(0), self.n + len(x)
        delta = mean - self.mean_F
        self.square_F = self.square_F + np.square(x - mean).sum(0) + np.square(delta) * (self.n * len(x) / total)
        self.mean_F, self.n = self.mean_F + delta * (len(x) / total), total

    @property
    def std_F(self) -> np.ndarray:
        """Standard deviation of the spots added so far, float64 (F,)."""
        std: np.ndarray = np.sqrt(self.square_F / max(self.n, 1))
        return std


def standardise(x_NF: np.ndarray, mean_F: np.ndarray, std_F: np.ndarray, section: Moments | None = None) -> np.ndarray:
    """Standardise features within their section; a section with few spots (:data:`MIN_SECTION_SPOTS`) uses given statistics.

    Parameters
    ----------
    x_NF
        Features of a section, or of a part of it.
    mean_F, std_F
        Mean and standard deviation for a section with few spots.
    section
        Moments of the section if ``x_NF`` is a part of it; None if ``x_NF`` is the complete section.
    """
    x = np.asarray(x_NF, np.float64)
    if section is None and len(x) >= MIN_SECTION_SPOTS:
        mean_F, std_F = x.mean(0), x.std(0)
    elif section is not None and section.n >= MIN_SECTION_SPOTS:
        mean_F, std_F = np.asarray(section.mean_F), section.std_F
    return (x - mean_F) / np.where(std_F > 1e-9, std_F, 1.0)
