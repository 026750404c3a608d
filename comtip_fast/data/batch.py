"""The batch of a training step; every loader returns the same batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Batch:
    """B spots and the step panel of G genes; with several ranks, the b spots of this rank.

    ``tiles`` is None if ``features`` holds the output of a frozen stem for them.
    """

    tiles: Tensor | None
    """uint8 (B, 3, S, S)."""
    features: Tensor | None
    """float (B, P, c), features of the tiles from a frozen stem."""
    panel: Tensor
    """int32 (G,), rows of the gene table."""
    levels: Tensor
    """uint8 (B, G)."""
    measured: Tensor
    """bool (B, G): whether the spot's section measured the gene."""
    section: Tensor
    """int32 (B,), section number of each spot."""
    spot_index: Tensor
    """int64 (B,)."""
    step: int
    global_size: int = 0
    """Number of spots in the global batch; 0 if this batch is the global batch."""
    panel_host: np.ndarray | None = None
    """The panel in host memory, for sizes that depend on it; None if they must be read from the device."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on ``device``."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in moved.items()}
        return Batch(**moved)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Batch:
        """Return the batch with its tensors replaced, e.g. by copies on a device; fields that are None stay None."""
        changed: dict[str, Any] = {name: tensors[name] for name in self.tensors()}
        return replace(self, **changed)

    def select(self, rows: slice) -> Batch:
        """Return a subset of the spots, with the same panel."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("tiles", "features", "levels", "measured", "section", "spot_index"):
            values[name] = None if values[name] is None else values[name][rows]
        return Batch(**values)
