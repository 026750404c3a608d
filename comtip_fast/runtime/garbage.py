"""Garbage collection of Python between two training steps instead of within them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause the collection of reference cycles inside the block, if it is enabled.

    A step makes thousands of objects and no cycles, and the collector visits every object of the process to find none. It uses a
    tenth of the time that the host needs for a step with near-empty tensors (``bench/train/host_time.py``), and other ranks
    would wait for a rank that collects. Objects without cycles are released as always.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
