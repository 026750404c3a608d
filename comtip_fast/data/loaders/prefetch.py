"""Items made in the background by one thread, a bounded number of them ahead."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
_POLL_S = 0.1


class Ahead(Generic[Item]):
    """Iterates over ``source`` in a thread of its own.

    Parameters
    ----------
    source
        A generator; it is closed in its thread.
    depth
        Items that may wait; one more is being made.
    """

    def __init__(self, source: Iterator[Item], depth: int) -> None:
        self._source = source
        self._ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="comtip-loader", daemon=True)
        self._thread.start()
        # The interpreter must not be torn down under a thread that is inside a decoder.
        atexit.register(self.stop)

    def __iter__(self) -> Iterator[Item]:
        while True:
            item, error = self._ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    def stop(self) -> None:
        """Stop the thread and forget what is ready; may be called twice."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=_POLL_S)
            except queue.Empty:
                continue
        self._thread.join()
        atexit.unregister(self.stop)

    def _work(self) -> None:
        last: tuple[Item | None, BaseException | None] = (None, None)
        try:
            for item in self._source:
                if not self._put((item, None)):
                    return
        except BaseException as error:
            last = (None, error)
        finally:
            close = getattr(self._source, "close", None)
            if close is not None:
                close()
            self._put(last)

    def _put(self, entry: tuple[Item | None, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(entry, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False
