"""Retrieval between paired image and text vectors. Shapes: N spots, D the width of the shared space."""

from __future__ import annotations

import numpy as np

KS = (1, 5, 10)
MAX_SIMILARITIES = 1 << 24
"""Number of similarities that are computed at once; it bounds memory to 128 MiB for any number of sections."""


def ranks(query_ND: np.ndarray, key_ND: np.ndarray) -> np.ndarray:
    """Return the rank, from 1, of each query's own key among all keys by cosine similarity; int64 (N,).

    Equal similarities count against the own key.
    """
    query, key = _unit(query_ND), _unit(key_ND)
    own = np.einsum("nd,nd->n", query, key)
    out = np.empty(len(query), np.int64)
    step = max(1, MAX_SIMILARITIES // max(1, len(key)))
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        similar = query[part] @ key.T
        rows = np.arange(similar.shape[0])
        similar[rows, rows + start] = own[part]  # the same value in both products
        out[part] = (similar >= own[part][:, None]).sum(1)
    return out


def recall_at(rank_N: np.ndarray, k: int) -> np.ndarray:
    """Return 1 for each query whose own key is among the first k, otherwise 0, float64 (N,)."""
    return (rank_N <= k).astype(np.float64)


def chance(n: int, k: int) -> float:
    """Return the recall at k of a random ranking of n keys; NaN without keys."""
    return min(1.0, k / n) if n else float("nan")


def _unit(x_ND: np.ndarray) -> np.ndarray:
    x = np.asarray(x_ND, np.float64)
    unit: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return unit
