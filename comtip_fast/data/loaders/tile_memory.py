"""Memory of the tiles of batches, which is used again when no one refers to a batch any more.

The C library returns blocks of more than 32 MB to the system at once, e.g. 217 tiles of 224 px; every batch would then begin with
page faults.
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np


class TileMemory:
    """Allocates uint8 arrays in memory that it gets back when the last reference to an array, or to a view of it, is deleted.

    May be used by several threads at the same time.

    Parameters
    ----------
    kept
        Largest number of free blocks that are kept; the memory of further ones is freed.

    Attributes
    ----------
    allocated
        Number of blocks that were allocated so far.
    """

    def __init__(self, kept: int) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=kept)
        self.allocated = 0

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an uninitialised array of a shape, whose memory no other array in use has."""
        size = math.prod(shape)
        if size == 0:
            return np.empty(shape, np.uint8)
        try:
            block = self._free.popleft()
        except IndexError:
            block = None
        if block is None or block.size < size:
            self.allocated += 1
            block = np.empty(size, np.uint8)
        # Views of this array refer to it. Of a slice of the block, they would refer to the block.
        lent = np.frombuffer(block.data, np.uint8, size)
        weakref.finalize(lent, self._free.append, block).atexit = False
        return lent.reshape(shape)

    def clear(self) -> None:
        """Free the memory that no array in use has."""
        self._free.clear()
