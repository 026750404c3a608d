"""Section statistics for the linear readout: moments, which can be accumulated over parts, and means over neighbours.

Shapes: N spots, n of them in a part, F features, k candidate neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

NEIGHBOURS, MAX_DISTANCE = 6, 1.3
"""A spot's neighbours are at most this many nearest spots, within this multiple of the median distance to the nearest spot."""
MIN_SECTION_SPOTS = 20
"""Sections with fewer spots are standardised with the mean and standard deviation of training."""
QUERY_ROWS = 16_384
"""Number of spots whose neighbours are searched at once."""


class Neighbours:
    """Neighbour search among N >= 2 spots, for some rows at a time.

    Parameters
    ----------
    xy_N2
        Positions in any unit.
    """

    def __init__(self, xy_N2: np.ndarray) -> None:
        self._xy = np.asarray(xy_N2, np.float64)
        self._tree = cKDTree(self._xy)
        self._k = min(NEIGHBOURS + 1, len(self._xy))
        nearest = np.empty(len(self._xy))
        for start in range(0, len(nearest), QUERY_ROWS):
            part = slice(start, start + QUERY_ROWS)
            nearest[part] = self._tree.query(self._xy[part], k=self._k)[0][:, 1]
        self.spacing = float(np.median(nearest))
        """Median distance to the nearest spot."""

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return candidates for the n spots ``rows``, int64 (n, k), and which of the candidates are neighbours, bool (n, k)."""
        distance, index = self._tree.query(self._xy[rows], k=self._k)
        return index, (distance <= MAX_DISTANCE * self.spacing) & (index != rows[:, None])


def mean_over(own_nF: np.ndarray, all_MF: np.ndarray, index_nk: np.ndarray, near_nk: np.ndarray) -> np.ndarray:
    """Return the mean of ``all_MF[index_nk]`` over neighbours (``near_nk``); a spot without neighbours keeps its ``own_nF`` row."""
    count = near_nk.sum(1, keepdims=True)
    mean = np.zeros(own_nF.shape, np.float64)
    for j in range(near_nk.shape[1]):
        mean += np.where(near_nk[:, j : j + 1], all_MF[index_nk[:, j]], 0.0)
    return np.where(count > 0, mean / np.maximum(count, 1), own_nF)


def neighbour_mean(x_NF: np.ndarray, xy_N2: np.ndarray) -> np.ndarray:
    """Return the mean of ``x_NF`` over each spot's neighbours, (N, F); a spot without neighbours keeps its own row."""
    if len(x_NF) < 2:
        return x_NF
    return mean_over(x_NF, x_NF, *Neighbours(xy_N2).of(np.arange(len(x_NF))))


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
