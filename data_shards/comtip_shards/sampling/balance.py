"""Epochs in which groups of spots (organs, platforms) weigh alike: a pure function of (seed, epoch)."""

from __future__ import annotations

import numpy as np

from comtip_shards.sampling.rng import bits


def balanced_draw(group: np.ndarray, spot_index: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Draw an epoch in which every group has the same number of spots, give or take one.

    Parameters
    ----------
    group, spot_index
        (n,): group of each spot (any values), and the spots.
    seed, epoch
        All that the draw depends on.

    Returns
    -------
    int64 (n,)
        A group goes through its spots in keyed order as often as its share asks: a small group's spots come
        several times, and a large group gives another part of its spots in every epoch.
    """
    groups = np.unique(group)
    share, more = divmod(spot_index.size, groups.size)
    parts = []
    for i, name in enumerate(groups):
        own = np.asarray(spot_index, np.int64)[group == name]
        own = own[np.argsort(bits(seed, "balance", epoch, index=own), kind="stable")]
        parts.append(np.resize(own, share + (i < more)))
    return np.concatenate(parts)
