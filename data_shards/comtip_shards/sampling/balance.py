"""Epochs in which all groups of spots (organs, platforms) have equal weight; a pure function of (seed, epoch)."""

from __future__ import annotations

import numpy as np

from comtip_shards.sampling.rng import bits


def balanced_draw(
    group: np.ndarray, spot_index: np.ndarray, seed: int, epoch: int, run_of: np.ndarray | None = None
) -> np.ndarray:
    """Draw an epoch in which the numbers of spots of all groups differ by at most one.

    Parameters
    ----------
    group, spot_index
        (n,): group of each spot (any values that NumPy can sort), and the spots.
    seed, epoch
        The draw depends only on these.
    run_of
        (n,): run of each spot (:func:`comtip_shards.sampling.order.runs`). Spots are then drawn run by run instead of one
        by one, and each pass over a group's spots is in the order of the shards.

    Returns
    -------
    int64 (n,)
        Spots of the groups, one group after the other. A group repeats its spots in keyed order until its share is filled:
        spots of a small group occur several times, and a large group contributes a different subset in every epoch.
    """
    spot_index = np.asarray(spot_index, np.int64)
    groups = np.unique(group)
    share, more = divmod(spot_index.size, groups.size)
    parts = []
    for i, name in enumerate(groups):
        of = group == name
        own, first = spot_index[of], (spot_index if run_of is None else run_of)[of]
        keys = bits(seed, "balance", epoch, index=first)
        # Keys of distinct spots differ, so the stable order needs no second key; spots of a run share one.
        own = own[np.argsort(keys, kind="stable") if run_of is None else np.lexsort((own, keys))]
        drawn = np.resize(own, share + (i < more))
        if run_of is not None:
            drawn = drawn[np.lexsort((drawn, np.arange(drawn.size) // own.size))]
        parts.append(drawn)
    return np.concatenate(parts)
