"""Features of a frozen stem: computed once for every view of every training spot, and kept in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

log = logging.getLogger("comtip_fast")
Stem = Callable[[Tensor], Tensor]
"""Maps uint8 tiles (N, 3, S, S) to features (N, P, c)."""
Tiles = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, Tensor]]
"""Maps spots and their views, int64 (n,) each, to the m spots that could be read, and to their tiles, uint8 (m, 3, S, S)."""


class StemFeatures:
    """Features of all spots in all views.

    Parameters
    ----------
    stem
        The frozen stem.
    spots
        int64 (n,), the training spots, ascending.
    views
        Number of views.
    """

    def __init__(self, stem: Stem, spots: np.ndarray, views: int) -> None:
        self._stem, self._spots, self._views = stem, spots, views
        self._features: Tensor | None = None
        """float16 (views, n, P, c)."""

    def compute(self, tiles: Tiles) -> None:
        """Compute the features at the first call, in a fixed order; ``tiles`` reads the tiles. Raises the errors of ``tiles``."""
        if self._features is None:
            self._features = torch.stack([self._of_view(tiles, view) for view in range(self._views)])

    def of(self, spots: np.ndarray, view: np.ndarray) -> Tensor:
        """Return the features of n spots, float32 (n, P, c), in their views, int64 (n,); call :meth:`compute` before."""
        assert self._features is not None
        rows = np.searchsorted(self._spots, spots)
        return self._features[torch.from_numpy(view), torch.from_numpy(rows)].float()

    def _of_view(self, tiles: Tiles, view: int, size: int = 128) -> Tensor:
        """Return one view's features of all spots, float16 (n, P, c); the rows of damaged spots are zero."""
        spots = self._spots
        log.info(
            "computing the features of the frozen stem: view %d of %d, %d tiles", view + 1, self._views, spots.size
        )
        out: Tensor | None = None
        label = f"frozen stem, view {view + 1} of {self._views}"
        for start in tqdm(
            range(0, spots.size, size), desc=label, unit=" tiles", unit_scale=size, leave=False, disable=None
        ):
            chunk = spots[start : start + size]
            readable, read = tiles(chunk, np.full(chunk.shape, view))
            features = self._stem(read).half()
            if out is None:
                out = torch.zeros((spots.size, *features.shape[1:]), dtype=torch.half)
            out[torch.from_numpy(np.searchsorted(spots, readable))] = features
        assert out is not None
        return out
