"""Epochs in which groups of spots (sets, organs, platforms) have equal or tempered weight; a pure function of (seed, epoch)."""

from __future__ import annotations

import numpy as np

from comtip_shards.sampling.rng import bits


def balanced_draw(
    group: np.ndarray,
    spot_index: np.ndarray,
    seed: int,
    epoch: int,
    run_of: np.ndarray | None = None,
    temperature: float | None = None,
) -> np.ndarray:
    """Draw an epoch in which groups have the numbers of spots that :func:`group_shares` returns.

    Parameters
    ----------
    group, spot_index
        (n,): group of each spot (any values that NumPy can sort), and the spots.
    seed, epoch
        The draw depends only on these.
    run_of
        (n,): run of each spot (:func:`comtip_shards.sampling.order.runs`). Spots are then drawn run by run instead of one
        by one, and each pass over a group's spots is in the order of the shards.
    temperature
        See :func:`group_shares`.

    Returns
    -------
    int64 (n,)
        Spots of the groups, one group after the other. A group repeats its spots in keyed order until its share is filled:
        spots of a small group occur several times, and a large group contributes a different subset in every epoch.
    """
    spot_index = np.asarray(spot_index, np.int64)
    groups, sizes = np.unique(group, return_counts=True)
    parts = []
    for name, share in zip(groups, group_shares(sizes, temperature).tolist(), strict=True):
        of = group == name
        own, first = spot_index[of], (spot_index if run_of is None else run_of)[of]
        keys = bits(seed, "balance", epoch, index=first)
        # Keys of distinct spots differ, so the stable order needs no second key; spots of a run share one.
        own = own[np.argsort(keys, kind="stable") if run_of is None else np.lexsort((own, keys))]
        drawn = np.resize(own, share)
        if run_of is not None:
            drawn = drawn[np.lexsort((drawn, np.arange(drawn.size) // own.size))]
        parts.append(drawn)
    return np.concatenate(parts)


def group_shares(sizes: np.ndarray, temperature: float | None) -> np.ndarray:
    """Return the number of spots that each group contributes to an epoch, int64 (n,); their sum is the sum of ``sizes``.

    Parameters
    ----------
    sizes
        (n,), number of spots of each group.
    temperature
        T, at least 1: shares are proportional to size ** (1 / T), so 1 keeps the sizes. None: equal shares, the limit of a large T.
    """
    total = int(np.sum(sizes))
    if temperature is None:
        share, more = divmod(total, len(sizes))
        return share + (np.arange(len(sizes)) < more)
    # Relative to the largest group, so that no power overflows; the spots that rounding down leaves go to the largest remainders.
    weight = (np.asarray(sizes, np.float64) / np.max(sizes)) ** (1 / temperature)
    exact = total * weight / weight.sum()
    shares = np.floor(exact + 1e-9).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]] += 1
    return shares
