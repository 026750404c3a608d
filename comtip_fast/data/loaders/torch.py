"""The plain loader: Pillow in this process, on a few threads. What other loaders give is measured against it."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from comtip_fast.data.loaders.base import BaseLoader, Made
from comtip_fast.data.loaders.schedule import Request


class TorchLoader(BaseLoader):
    """Each of ``data.workers`` threads makes one batch at a time; ``data.prefetch`` batches are under way or ready."""

    def _stream(self, requests: Iterator[Request]) -> Generator[Made, None, None]:
        data = self.config.data
        if data.workers == 0:
            yield from map(self._make, requests)
            return
        with ThreadPoolExecutor(data.workers, thread_name_prefix="comtip-loader") as pool:
            ahead: deque[Future[Made]] = deque()
            try:
                for request in requests:
                    ahead.append(pool.submit(self._make, request))
                    if len(ahead) > data.prefetch:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()
