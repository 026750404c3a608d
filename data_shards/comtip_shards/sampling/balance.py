"""Epochs with equally weighted groups of spots (organs, platforms): a pure function of (seed, epoch)."""

from __future__ import annotations

import numpy as np

from comtip_shards.sampling.rng import bits


def balanced_draw(group: np.ndarray, spot_index: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Draw an epoch in which the numbers of spots of all groups differ by at most one.

    Parameters
    ----------
    group, spot_index
        (n,): group of each spot (any values), and the spots.
    seed, epoch
        The draw depends only on these.

    Returns
    -------
    int64 (n,)
        Each group repeats its spots in keyed order until its share is filled: spots of a small group occur several
        times, and a large group contributes a different subset in every epoch.
    """
    groups = np.unique(group)
    share, more = divmod(spot_index.size, groups.size)
    parts = []
    for i, name in enumerate(groups):
        own = np.asarray(spot_index, np.int64)[group == name]
        own = own[np.argsort(bits(seed, "balance", epoch, index=own), kind="stable")]
        parts.append(np.resize(own, share + (i < more)))
    return np.concatenate(parts)
