"""Order of spots: a pure function of (seed, epoch), so that it can be recomputed at any time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np

from comtip_shards.sampling.rng import bits, permutation

WINDOW = 512
"""Number of pieces considered when a batch is composed."""


def epoch_batches(
    section: np.ndarray,
    spot_index: np.ndarray,
    batch_size: int,
    sections_per_batch: int | None,
    seed: int,
    epoch: int,
    run: int | np.ndarray = 1,
) -> list[np.ndarray]:
    """Return the batches of one epoch; every spot is in exactly one.

    Parameters
    ----------
    section, spot_index
        (n,) integers: section of each spot, and the spots.
    batch_size
        B; the last batch may be smaller, or larger by one spot. With ``sections_per_batch``, any batch may be smaller, because
        pieces are not cut again to fill it.
    sections_per_batch
        k: spots are shuffled within their section and cut into pieces of about B / k; the pieces are shuffled, and a batch
        is filled with about k of them, from different sections if available. None shuffles all spots globally, as does a
        single section.
    seed, epoch
        The order depends only on these.
    run
        Length of runs: a section's spots are cut into runs of this many spots that are adjacent in the shards, with a
        different offset in each epoch, and runs are shuffled instead of spots. Each run is one sequential read and,
        by the layout of the shards, a random sample of its section. 1 shuffles individual spots. An array (n,) gives
        the run of each spot instead.

    Returns
    -------
    list of int64 arrays
        The spots of each batch. A last batch of a single spot is appended to the previous one, because it would have no
        negatives.
    """
    section, spot_index = np.asarray(section), np.asarray(spot_index, np.int64)
    if sections_per_batch is None or (section.size and bool((section == section[0]).all())):
        order = shuffled(section, spot_index, run, seed, epoch)
        return merged_tail([order[i : i + batch_size] for i in range(0, order.size, batch_size)])
    pieces = pieces_of(section, spot_index, batch_size, sections_per_batch, seed, epoch, run)
    return merged_tail(_combine(pieces, batch_size))


def shuffled(section: np.ndarray, spot_index: np.ndarray, run: int | np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return the spots in keyed order, keeping runs of a section together; parameters as in :func:`epoch_batches`."""
    leader = runs(section, spot_index, run, seed, epoch) if isinstance(run, int) else run
    # Spots of one run have the same key; the secondary key keeps them in the order of the shard.
    return spot_index[np.lexsort((spot_index, bits(seed, "order", epoch, index=leader)))]


def runs(section: np.ndarray, spot_index: np.ndarray, run: int, seed: int, epoch: int) -> np.ndarray:
    """Return for each spot the first spot of its run, int64 (n,), which identifies the run.

    The spots of a section, in ascending order, are cut into runs of ``run`` spots with an offset that depends on the seed and
    the epoch; the first and the last run of a section may be shorter. The spots must be distinct.
    """
    if run == 1:
        return spot_index
    leader = np.empty_like(spot_index)
    for s, at in by_section(section):
        own = np.sort(spot_index[at])
        position = np.arange(own.size)
        offset = int(bits(seed, "runs", epoch, index=s)) % run
        first = own[np.maximum(position - (position + offset) % run, 0)]
        leader[at] = first[np.searchsorted(own, spot_index[at])]
    return leader


def by_section(section: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray]]:
    """Yield (section, indices of its entries in ``section``), sections in ascending order, after at most one sort of the array."""
    ascending = bool((section[1:] >= section[:-1]).all())
    order = slice(0, section.size) if ascending else np.argsort(section, kind="stable")
    starts = [0, *(np.flatnonzero(np.diff(section[order])) + 1).tolist(), section.size]
    for start, end in pairwise(starts):
        at = slice(start, end) if isinstance(order, slice) else order[start:end]
        if end > start:
            yield int(section[at][0]), at


def pieces_of(
    section: np.ndarray,
    spot_index: np.ndarray,
    batch_size: int,
    k: int,
    seed: int,
    epoch: int,
    run: int | np.ndarray,
    *counters: int,
) -> list[tuple[int, np.ndarray]]:
    """Return (section, spots) pieces in shuffled order; pieces of one section differ by at most one spot.

    Parameters are those of :func:`epoch_batches`, with ``k`` for ``sections_per_batch``; different ``counters`` give different
    orders of the pieces.
    """
    pieces = []
    size = max(1, batch_size // k)
    for s, at in by_section(np.asarray(section)):
        own = spot_index[at]
        own = shuffled(np.full(own.size, s), own, run if isinstance(run, int) else run[at], seed, epoch)
        pieces += [(s, part) for part in np.array_split(own, -(-own.size // size))]
    return [pieces[i] for i in permutation(seed, "pieces", epoch, *counters, n=len(pieces))]


def _combine(pieces: list[tuple[int, np.ndarray]], batch_size: int) -> list[np.ndarray]:
    """Fill batches from the front of the queue, first with one piece per section, then with any that still fits.

    Only the first ``WINDOW`` pieces of the queue are considered, so that the time is linear in the number of pieces.
    """
    batches = []
    later = iter(pieces)
    queue = list(islice(later, WINDOW))
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
        removed = set(taken)
        queue = [piece for i, piece in enumerate(queue) if i not in removed] + list(islice(later, len(taken)))
    return batches


def merged_tail(batches: list[np.ndarray]) -> list[np.ndarray]:
    """Append a last batch of one spot to the batch before it."""
    if len(batches) > 1 and batches[-1].size == 1:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches
