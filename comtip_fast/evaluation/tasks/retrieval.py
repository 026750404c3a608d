"""Retrieval between paired image and text vectors. Shapes: N spots, D the width of the shared space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KS = (1, 5, 10)
MAX_SIMILARITIES = 1 << 24
"""Number of similarities that are computed at once; it bounds memory to 128 MiB for any number of sections."""
TOLERANCE = 1e-6
"""Cosine similarities that differ by less are equal: vectors are computed in fp32, whose rounding is about 1e-7."""


@dataclass(frozen=True)
class Ranking:
    """Position of each query's own key among all keys, by decreasing similarity."""

    above_N: np.ndarray
    """int64, number of keys that are more similar than the own key."""
    tied_N: np.ndarray
    """int64, number of keys as similar as the own key, at least 1 because it counts itself."""


def ranks(query_ND: np.ndarray, key_ND: np.ndarray) -> Ranking:
    """Rank each query's own key among all keys by cosine similarity; similarities within :data:`TOLERANCE` are equal."""
    query, key = _unit(query_ND), _unit(key_ND)
    above, tied = np.empty(len(query), np.int64), np.empty(len(query), np.int64)
    step = max(1, MAX_SIMILARITIES // max(1, len(key)))
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        similar = query[part] @ key.T
        rows = np.arange(similar.shape[0])
        # The own similarity is taken from this product: another sum of the same terms is rounded differently.
        difference = similar - similar[rows, rows + start][:, None]
        above[part] = (difference > TOLERANCE).sum(1)
        tied[part] = (np.abs(difference) <= TOLERANCE).sum(1)
    return Ranking(above, tied)


def recall_at(ranking: Ranking, k: int) -> np.ndarray:
    """Return the probability that each query's own key is among the first k, with equal keys in random order, float64 (N,).

    It is 1 or 0 unless keys are equal. If all keys are equal, it is the recall of a random ranking (:func:`chance`).
    """
    share: np.ndarray = np.clip((k - ranking.above_N) / ranking.tied_N, 0.0, 1.0)
    return share


def chance(n: int, k: int) -> float:
    """Return the recall at k of a random ranking of n keys; NaN without keys."""
    return min(1.0, k / n) if n else float("nan")


def _unit(x_ND: np.ndarray) -> np.ndarray:
    x = np.asarray(x_ND, np.float64)
    unit: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return unit
