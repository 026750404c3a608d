"""The order of spots: a pure function of (seed, epoch), so that it can be asked for again at any time."""

from __future__ import annotations

from itertools import islice

import numpy as np

from comtip_shards.sampling.rng import bits, permutation

LOOK_AHEAD = 512
"""Pieces among which a batch is put together."""


def epoch_batches(
    section: np.ndarray,
    spot_index: np.ndarray,
    batch_size: int,
    sections_per_batch: int | None,
    seed: int,
    epoch: int,
    run: int = 1,
) -> list[np.ndarray]:
    """Return the batches of one epoch; every spot is in exactly one.

    Parameters
    ----------
    section, spot_index
        (n,) integers: section of each spot, and the spots.
    batch_size
        B; the last batch may be smaller.
    sections_per_batch
        k: spots are shuffled within their section and cut into pieces of about B / k, pieces are shuffled, and
        k of them, of different sections where there still are, make a batch. None shuffles all spots alike.
    seed, epoch
        All that the order depends on.
    run
        Spots that stay together: a section's spots are cut into runs of so many that lie side by side in the shards,
        at another place in each epoch, and runs are shuffled instead of spots. Each run is one sequential read and,
        by the layout of the shards, a random draw from its section. 1 shuffles every spot alike.

    Returns
    -------
    list of int64 arrays
        A batch of a single spot is joined to the one before it: it would have no negatives.
    """
    spot_index = np.asarray(spot_index, np.int64)
    if sections_per_batch is None or np.unique(section).size == 1:
        order = _shuffled(np.asarray(section), spot_index, run, seed, epoch)
        return _no_single([order[i : i + batch_size] for i in range(0, order.size, batch_size)])
    pieces = _pieces(section, spot_index, batch_size, sections_per_batch, seed, epoch, run)
    return _no_single(_combine(pieces, batch_size))


def _shuffled(section: np.ndarray, spot_index: np.ndarray, run: int, seed: int, epoch: int) -> np.ndarray:
    """Return the spots in keyed order, runs of a section kept whole."""
    leader = spot_index
    if run > 1:
        leader = np.empty_like(spot_index)
        for s in np.unique(section):
            own = np.sort(spot_index[section == s])
            place = np.arange(own.size)
            offset = int(bits(seed, "runs", epoch, index=int(s))) % run
            by_spot = own[np.maximum(place - (place + offset) % run, 0)]
            leader[section == s] = by_spot[np.searchsorted(own, spot_index[section == s])]
    # Spots of one run have the same number; the second key keeps them in the order of the shard.
    return spot_index[np.lexsort((spot_index, bits(seed, "order", epoch, index=leader)))]


def _pieces(
    section: np.ndarray, spot_index: np.ndarray, batch_size: int, k: int, seed: int, epoch: int, run: int
) -> list[tuple[int, np.ndarray]]:
    """Return (section, spots) pieces in shuffled order; pieces of one section differ by at most one spot."""
    pieces = []
    size = max(1, batch_size // k)
    for s in np.unique(section):
        own = spot_index[section == s]
        own = _shuffled(np.full(own.size, s), own, run, seed, epoch)
        pieces += [(int(s), part) for part in np.array_split(own, -(-own.size // size))]
    return [pieces[i] for i in permutation(seed, "pieces", epoch, n=len(pieces))]


def _combine(pieces: list[tuple[int, np.ndarray]], batch_size: int) -> list[np.ndarray]:
    """Fill batches from the front of the queue, passing over sections that the batch already has.

    Only the first pieces of the queue are looked at, so that millions of spots take seconds and not days.
    """
    batches = []
    later = iter(pieces)
    queue = list(islice(later, LOOK_AHEAD))
    while queue:
        taken: list[int] = []
        used: set[int] = set()
        room = batch_size
        smallest = min(part.size for _, part in queue)
        for distinct in (True, False):
            for i, (s, part) in enumerate(queue):
                if room < smallest:
                    break
                if i not in taken and part.size <= room and not (distinct and s in used):
                    taken.append(i)
                    used.add(s)
                    room -= part.size
        batches.append(np.concatenate([queue[i][1] for i in taken]))
        gone = set(taken)
        queue = [piece for i, piece in enumerate(queue) if i not in gone] + list(islice(later, len(taken)))
    return batches


def _no_single(batches: list[np.ndarray]) -> list[np.ndarray]:
    if len(batches) > 1 and batches[-1].size == 1:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches
