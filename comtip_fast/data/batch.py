"""One step's data, the same from every loader."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Batch:
    """B spots and the step panel of G genes; of a batch shared over ranks, this rank's b spots.

    ``tiles`` is None where ``features`` already holds what a frozen stem made of them.
    """

    tiles: Tensor | None
    """uint8 (B, 3, S, S)."""
    features: Tensor | None
    """float (B, P, c), a frozen stem's features of the same tiles."""
    panel: Tensor
    """int32 (G,), rows of the gene table."""
    levels: Tensor
    """uint8 (B, G)."""
    measured: Tensor
    """bool (B, G): the spot's section measured the gene."""
    section: Tensor
    """int32 (B,)."""
    spot_index: Tensor
    """int64 (B,)."""
    step: int
    of: int = 0
    """Spots in the global batch that these are a share of; 0 where they are all of it."""

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in moved.items()}
        return Batch(**moved)

    def part(self, rows: slice) -> Batch:
        """Return some of the spots, with the same panel."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("tiles", "features", "levels", "measured", "section", "spot_index"):
            own[name] = None if own[name] is None else own[name][rows]
        return Batch(**own)

    def spots(self) -> np.ndarray:
        """Return ``spot_index`` as numpy, for keyed randomness."""
        return self.spot_index.cpu().numpy()
