"""The batch of one training step. Every loader returns this class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from comtip_fast.config.schema import RunConfig
from comtip_fast.runtime import devices


def pads_panels(config: RunConfig, device: torch.device) -> bool:
    """Return whether panels of batches on ``device`` are padded to few sizes (``engine.panel_sizes``)."""
    return config.engine.panel_sizes > 0 and not devices.reads_are_free(device)


@dataclass
class Batch:
    """B spots of one step, and the G genes drawn for this step (the panel); with several ranks, B counts this rank's spots only."""

    tiles: Tensor | None
    """uint8 (B, 3, S, S), views of the tiles; None if ``features`` is given."""
    features: Tensor | None
    """float (B, P, c), features of the tiles from a frozen stem; None if ``tiles`` is given."""
    panel: Tensor
    """int32 (G,), indices into the trained genes."""
    levels: Tensor
    """uint8 (B, G), expression levels."""
    measured: Tensor
    """bool (B, G): whether the spot's section measured the gene."""
    section: Tensor
    """int32 (B,), index of each spot's section."""
    spot_index: Tensor
    """int64 (B,), index of each spot in the shard set."""
    step: int
    """Optimizer step, from 1."""
    global_size: int = 0
    """Number of spots in the global batch; 0 if this batch is the global batch."""
    panel_host: np.ndarray | None = None
    """The panel in host memory, from which sizes are computed; None if sizes must be read from the device."""
    padding: int = 0
    """Number of genes at the end of the panel that only pad it (:meth:`padded`)."""

    @cached_property
    def panel_int64(self) -> Tensor:
        """The panel as int64 (G,), converted once for all losses."""
        return self.panel.long()

    @cached_property
    def levels_int64(self) -> Tensor:
        """The levels as int64 (B, G), converted once for all losses."""
        return self.levels.long()

    @cached_property
    def section_int64(self) -> Tensor:
        """The sections as int64 (B,), converted once for all losses."""
        return self.section.long()

    @property
    def n_genes(self) -> int:
        """Number of genes of the panel without padding."""
        return self.panel.numel() - self.padding

    def padded(self, size: int, gene: int) -> Batch:
        """Return the batch with its panel padded to ``size`` genes; the batch must be in host memory.

        The padding repeats the index ``gene``, as a gene that no spot measured.
        """
        n = size - self.panel.numel()
        if n == 0:
            return self
        assert self.panel_host is not None
        return replace(
            self,
            panel=F.pad(self.panel, (0, n), value=gene),
            levels=F.pad(self.levels, (0, n)),
            measured=F.pad(self.measured, (0, n)),
            panel_host=np.pad(self.panel_host, (0, n), constant_values=gene),
            padding=self.padding + n,
        )

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on ``device``."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in moved.items()}
        return Batch(**moved)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by field name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Batch:
        """Return a copy with the tensors replaced, e.g. by copies on a device; fields that are None stay None."""
        changed: dict[str, Any] = {name: tensors[name] for name in self.tensors()}
        return replace(self, **changed)

    def select(self, rows: slice) -> Batch:
        """Return the batch of a subset of the spots, with the same panel."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("tiles", "features", "levels", "measured", "section", "spot_index"):
            values[name] = None if values[name] is None else values[name][rows]
        return Batch(**values)
