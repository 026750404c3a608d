"""Loader with several worker processes, each of which reads and decodes whole batches, in this project's batch order."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from itertools import cycle

from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.data.loaders.prepared import PreparedBatch
from comtip_fast.data.loaders.process import LoaderProcess
from comtip_fast.data.loaders.schedule import ScheduledBatch


class WdsLoader(BaseLoader):
    """Loader on n = ``data.workers`` processes, each of which loads every n-th batch.

    About ``data.prefetch`` batches are prepared in advance, at least one per process. With 0 workers, a batch is loaded in this
    process when it is requested.
    """

    name = "wds"

    def _stream(self, batches: Iterator[ScheduledBatch]) -> Generator[PreparedBatch, None, None]:
        n = self.config.data.workers
        if n == 0:
            yield from self._in_turn(batches)
            return
        shares = _dealt(batches, n)
        ahead = max(1, self.config.data.prefetch // n)
        processes: list[LoaderProcess] = []
        try:
            for share in shares:
                processes.append(self._from_process(self._in_turn, share, ahead))
            for process in cycle(processes):
                prepared = next(process, None)
                if prepared is None:
                    return
                yield prepared
        finally:
            for process in processes:
                process.close()

    def _in_turn(self, batches: Iterator[ScheduledBatch]) -> Iterator[PreparedBatch]:
        """Load one batch after the other."""
        return map(self._load, self._ahead(batches))


def _dealt(batches: Iterator[ScheduledBatch], n: int) -> list[Iterator[ScheduledBatch]]:
    """Return n iterators; number i yields batches i, i + n, and so on, whichever of them is asked first."""
    waiting: list[deque[ScheduledBatch]] = [deque() for _ in range(n)]
    turn = cycle(waiting)

    def share(own: deque[ScheduledBatch]) -> Iterator[ScheduledBatch]:
        while True:
            while not own:
                batch = next(batches, None)
                if batch is None:
                    return
                next(turn).append(batch)
            yield own.popleft()

    return [share(own) for own in waiting]
