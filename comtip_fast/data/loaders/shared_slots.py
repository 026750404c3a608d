"""Slots of memory that a worker process fills and the training process reads, without copies and without files.

The memory is mapped before the worker is forked, so both processes have it. It is anonymous: the size of ``/dev/shm``, which
containers often limit to 64 MB, does not matter. Memory that is never written to is not used.
"""

from __future__ import annotations

import io
import mmap
import pickle
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comtip_fast.data.loaders.schedule import ScheduledBatch
from comtip_fast.data.upload import ALIGNMENT

NO_SLOT = -1
"""Number of the slot of a batch that was too large for one, and was sent through the pipe."""
Layout = list[tuple[int, int]]
"""Offset and size in bytes of each array in a slot."""


class SharedSlots:
    """Memory of ``count`` slots of ``size`` bytes each; the reader counts the slots whose arrays are still in use.

    Parameters
    ----------
    count, size
        Number of slots, and bytes of each.
    lent
        Largest number of slots whose memory the reader hands out at a time. While as many are in use, batches are copied, so that a
        caller who keeps batches does not stop the worker.
    """

    def __init__(self, count: int, size: int, lent: int) -> None:
        self.count, self.size = count, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._memory = mmap.mmap(-1, max(1, count * self.size), flags=flags)
        self._lent = lent
        self._in_use: set[int] = set()
        self._released: deque[int] = deque()

    def write(self, slot: int, arrays: list[memoryview], layout: Layout) -> None:
        """Copy arrays into a slot, at the offsets of ``layout``."""
        for data, (offset, size) in zip(arrays, layout, strict=True):
            start = slot * self.size + offset
            self._memory[start : start + size] = data

    def read(self, slot: int, layout: Layout) -> list[memoryview]:
        """Return the arrays of a slot, which is released when the last of them is no longer referenced."""
        whole = np.frombuffer(self._memory, np.uint8, max(1, end_of(layout)), slot * self.size)
        if len(self._in_use) >= self._lent:
            whole = whole.copy()
            self._released.append(slot)
        else:
            self._in_use.add(slot)
            # The array may be deleted in any thread.
            weakref.finalize(whole, self._release, slot).atexit = False
        return parts(whole.data, layout)

    def released(self) -> list[int]:
        """Return the slots that were released since the last call."""
        found = []
        while self._released:
            found.append(self._released.popleft())
        return found

    def _release(self, slot: int) -> None:
        self._in_use.discard(slot)
        self._released.append(slot)


def end_of(layout: Layout) -> int:
    """Return the bytes that the arrays of a layout take, with the gaps between them."""
    return sum(layout[-1]) if layout else 0


def parts(whole: memoryview, layout: Layout) -> list[memoryview]:
    """Return the arrays of a buffer."""
    return [whole[offset : offset + size] for offset, size in layout]


class _Pickler(pickle.Pickler):
    """Pickles a batch without the bytes of its arrays and tensors; its :class:`ScheduledBatch` is known to the reader."""

    def reducer_override(self, obj: Any) -> Any:
        """Pass tensors as arrays, whose bytes can be kept apart."""
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.contiguous().numpy(),)
        return NotImplemented

    def persistent_id(self, obj: Any) -> str | None:
        """Leave out the scheduled batch, which has the spots of all ranks."""
        return "scheduled" if isinstance(obj, ScheduledBatch) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes | memoryview, arrays: list[memoryview], scheduled: ScheduledBatch) -> None:
        super().__init__(io.BytesIO(data), buffers=arrays)
        self._scheduled = scheduled

    def persistent_load(self, pid: str) -> ScheduledBatch:
        return self._scheduled


def flatten(item: object) -> tuple[bytes, list[memoryview], Layout]:
    """Return the pickle of a batch without its arrays, the arrays, and their offsets in a slot."""
    buffers: list[pickle.PickleBuffer] = []
    out = io.BytesIO()
    _Pickler(out, protocol=5, buffer_callback=buffers.append).dump(item)
    arrays = [buffer.raw() for buffer in buffers]
    layout, end = [], 0
    for data in arrays:
        layout.append((end, data.nbytes))
        end += -(-data.nbytes // ALIGNMENT) * ALIGNMENT
    return out.getvalue(), arrays, layout


def restore(data: bytes | memoryview, arrays: list[memoryview], scheduled: ScheduledBatch) -> Any:
    """Return a batch from the results of :func:`flatten`; its arrays and tensors are views of ``arrays``."""
    return _Unpickler(data, arrays, scheduled).load()
