"""Epochs for sets that are too large for one node to fetch: each part of a batch comes from a fixed subset of the tars.

The tars are put in one keyed order for the whole run and cut into S virtual slots with equally many spots. Every batch has S
parts of equal size, part s from slot s. Ranks read contiguous slices of a batch, so a node whose ranks hold whole parts reads
the same share of the tars in every epoch. A batch depends on S but not on the number of nodes.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from comtip_shards.sampling.order import merged_tail, pieces_of, shuffled
from comtip_shards.sampling.rng import bits


def slot_batches(
    shard: np.ndarray,
    section: np.ndarray,
    spot_index: np.ndarray,
    batch_size: int,
    n_slots: int,
    sections_per_batch: int | None,
    seed: int,
    epoch: int,
    run: int | np.ndarray = 1,
) -> list[np.ndarray]:
    """Return the batches of one epoch; every spot is in exactly one.

    Parameters
    ----------
    shard, section, spot_index
        (n,) integers: tar and section of each spot, and the spots.
    batch_size, n_slots
        B and S; S divides B. All batches but the last hold B / S spots of every slot.
    sections_per_batch
        k, a multiple of S: each part of a batch is filled from pieces of about B / k spots of one section. None shuffles
        all spots of a slot.
    seed, epoch
        The slots depend on the seed only, the order within a slot on both.
    run
        As in :func:`comtip_shards.sampling.order.epoch_batches`.

    Returns
    -------
    list of int64 arrays
        The spots of each batch, its parts in the order of their slots; the last batch holds what remains of all slots. If that
        is a single spot, it is appended to the batch before it.

    Raises
    ------
    ValueError
        S does not divide B, or k is not a multiple of S.
    """
    k = sections_per_batch
    if batch_size % n_slots or (k is not None and k % n_slots):
        also = "" if k is None else f" and sections_per_batch={k}"
        raise ValueError(
            f"batch_size={batch_size}{also} must be divisible by n_slots={n_slots}; change the one that is not, or n_slots"
        )
    section, spot_index = np.asarray(section), np.asarray(spot_index, np.int64)
    size, streams = batch_size // n_slots, []
    for number, at in enumerate(slots(shard, n_slots, seed)):
        own, of, lead = spot_index[at], section[at], run if isinstance(run, int) else run[at]
        if k is None:
            streams.append(shuffled(of, own, lead, seed, epoch))
            continue
        # Slots with equally many pieces must not have the same permutation.
        pieces = pieces_of(of, own, size, k // n_slots, seed, epoch, lead, number)
        streams.append(np.concatenate([part for _, part in pieces]) if pieces else own)
    full = min(stream.size for stream in streams) // size
    steps = [np.concatenate([s[i * size : (i + 1) * size] for s in streams]) for i in range(full)]
    tail = np.concatenate([s[full * size :] for s in streams])
    return merged_tail([*steps, tail] if tail.size else steps)


def slots(shard: np.ndarray, n_slots: int, seed: int) -> list[np.ndarray]:
    """Return the indices of the entries of every slot, ascending; the sizes of slots differ by at most one.

    Parameters
    ----------
    shard
        (n,) integers, tar of each entry.
    n_slots, seed
        Number of slots, and seed of the order of the tars. A tar at the boundary of two slots belongs to both.
    """
    tars, inverse = np.unique(np.asarray(shard), return_inverse=True)
    rank = np.empty(tars.size, np.int64)
    rank[np.argsort(bits(seed, "slots", index=tars), kind="stable")] = np.arange(tars.size)
    order = np.argsort(rank[inverse], kind="stable")
    cuts = [order.size * s // n_slots for s in range(n_slots + 1)]
    return [np.sort(order[low:high]) for low, high in pairwise(cuts)]
