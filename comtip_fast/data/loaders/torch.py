"""The reference loader, which decodes with Pillow on threads; tests compare the other loaders with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.data.loaders.prepared import PreparedBatch
from comtip_fast.data.loaders.process import READY, process_stream
from comtip_fast.data.loaders.schedule import ScheduledBatch


class TorchLoader(BaseLoader):
    """Loader on ``data.workers`` threads, each of which loads a batch; ``data.prefetch`` batches are in progress or ready.

    The threads may run in a process of their own (``data.loader_process``). With 0 workers, a batch is loaded in the calling thread
    when it is requested.
    """

    name = "torch"

    def _stream(self, batches: Iterator[ScheduledBatch]) -> Generator[PreparedBatch, None, None]:
        if self.has_own_process:
            yield from process_stream(self._from_process(self._threaded, batches, self.config.data.prefetch + READY))
        else:
            yield from self._threaded(batches)

    def _threaded(self, batches: Iterator[ScheduledBatch]) -> Generator[PreparedBatch, None, None]:
        """Load the batches on threads of this process."""
        data = self.config.data
        if data.workers == 0:
            yield from map(self._load, self._ahead(batches))
            return
        with ThreadPoolExecutor(data.workers, thread_name_prefix="comtip-loader") as pool:
            pending: deque[Future[PreparedBatch]] = deque()
            try:
                for scheduled in self._ahead(batches):
                    pending.append(pool.submit(self._load, scheduled))
                    if len(pending) > data.prefetch:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
