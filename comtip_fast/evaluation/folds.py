"""Folds of training spots for the cross-validation that chooses a ridge penalty."""

from __future__ import annotations

import numpy as np

FOLDS = 4
"""Number of spatial folds of the spots of one section."""


def ridge_folds(section_N: np.ndarray, xy_N2: np.ndarray) -> np.ndarray:
    """Return the fold of each training spot, int64 (N,): one fold per section, or spatial folds if there is one section.

    Neighbouring spots are alike: in folds of single spots, every held-out spot has neighbours in training, and the chosen penalty
    is too small for another section.

    Parameters
    ----------
    section_N
        Section of each spot.
    xy_N2
        Positions of the spots, in any unit.
    """
    sections, fold = np.unique(section_N, return_inverse=True)
    return fold.astype(np.int64) if sections.size > 1 else spatial_folds(np.asarray(xy_N2, np.float64))


def spatial_folds(xy_N2: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    """Return the fold of each spot, int64 (N,): compact groups of nearly equal size, by repeated halving along the longer side."""
    fold = np.zeros(len(xy_N2), np.int64)
    parts = [np.arange(len(xy_N2))]
    while len(parts) < folds:
        largest = parts.pop(int(np.argmax([p.size for p in parts])))
        axis = int(np.argmax(np.ptp(xy_N2[largest], axis=0)))
        order = largest[np.argsort(xy_N2[largest, axis], kind="stable")]
        parts += [order[: order.size // 2], order[order.size // 2 :]]
    for i, part in enumerate(parts):
        fold[part] = i
    return fold
