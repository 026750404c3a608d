"""Prefetching: an iterator that runs in a background thread, a bounded number of items ahead."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
_POLL_S = 0.1


class Prefetcher(Generic[Item]):
    """Iterator over the items of ``source``, which runs in a background thread; the iteration raises its exceptions.

    Parameters
    ----------
    source
        An iterator; a generator is closed in the background thread.
    depth
        Largest number of finished items in the queue; one more may be in progress, or finished and waiting for space.
    """

    def __init__(self, source: Iterator[Item], depth: int) -> None:
        self._source = source
        self._ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="comtip-loader", daemon=True)
        self._thread.start()
        # The interpreter must not exit while the thread is inside a decoder.
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
        """Stop the thread and discard finished items; may be called more than once."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=_POLL_S)
            except queue.Empty:
                continue
        self._thread.join()
        atexit.unregister(self.stop)

    def _run(self) -> None:
        """Put the items of the source, and then its exception or the end, into the queue."""
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
        """Add an entry to the queue; return False if :meth:`stop` was called first."""
        while not self._stop.is_set():
            try:
                self._ready.put(entry, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False
