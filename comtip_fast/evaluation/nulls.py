"""A null that keeps spatial structure: the predicted maps, turned and shifted on the section.

Two smooth maps correlate by chance far more often than shuffled spots would say. So each draw turns the predicted
map by a random angle, mirrors it or not, shifts it, and gives every spot the prediction of the spot that now lies
nearest. The map keeps its smoothness and nearly its values; only its place is wrong.
"""

from __future__ import annotations

import numpy as np
from comtip_shards.keyed import generator
from scipy.spatial import cKDTree

MAX_SHIFT = 0.5
"""Largest shift, as a share of the section's radius."""
MIN_TURN = np.pi / 4
"""Draws that hardly move the map would be no null."""


def moved_spots(xy_N2: np.ndarray, n_draws: int, *, seed: int, section: str) -> np.ndarray:
    """Return, for each draw, which spot's prediction every spot gets: int64 (n_draws, N)."""
    centred = np.asarray(xy_N2, np.float64) - np.mean(xy_N2, axis=0)
    radius = float(np.sqrt((centred**2).sum(1)).max()) or 1.0
    tree = cKDTree(centred)
    rng = generator(seed, "null", section)
    out = np.empty((n_draws, len(centred)), np.int64)
    for draw in range(n_draws):
        angle = rng.uniform(MIN_TURN, 2 * np.pi - MIN_TURN)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        if rng.random() < 0.5:
            turn = turn @ np.diag([1.0, -1.0])
        shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * radius
        out[draw] = tree.query(centred @ turn.T + shift)[1]
    return out
