"""Background fetching of the shards that the next batches of a remote set need, several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from comtip_shards import ShardSet

from comtip_fast.collectives import share_of
from comtip_fast.data.loaders.schedule import ScheduledBatch

AT_ONCE = 4
"""Number of shards that are fetched in the background at the same time."""


def fetched_ahead(
    batches: Iterator[ScheduledBatch], shards: ShardSet, depth: int, *, rank: int, world: int
) -> Iterator[ScheduledBatch]:
    """Yield the batches, and fetch in the background the shards that this rank needs for the next ``depth`` batches.

    For a set in a folder, or one that is read by ranges, nothing is fetched. Ranks of a node share a cache: one rank fetches a
    shard, and the others wait for it.

    Parameters
    ----------
    batches
        Batches in the order in which they will be read.
    shards
        The shard set.
    depth
        Number of batches (``data.fetch_ahead``); 0 fetches nothing.
    rank, world
        This rank and the number of ranks.
    """
    if not shards.fetches_shards or depth == 0:
        yield from batches
        return
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="comtip-fetch")
    waiting: deque[ScheduledBatch] = deque()
    recent: deque[set[int]] = deque(maxlen=depth)
    try:
        for scheduled in batches:
            own = scheduled.spots[share_of(scheduled.spots.size, rank, world)]
            needed = set(shards.shards_of(own).tolist())
            for shard in sorted(needed.difference(*recent)):
                pool.submit(shards.fetch, shard)
            recent.append(needed)
            waiting.append(scheduled)
            if len(waiting) > depth:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
