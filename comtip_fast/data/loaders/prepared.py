"""A batch between its loader and the step, and where it is prepared."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from comtip_shards import ShardError
from torch import Tensor

from comtip_fast.config.schema import DataConfig
from comtip_fast.data.augment.views import ViewPlan
from comtip_fast.data.batch import Batch
from comtip_fast.data.loaders.schedule import ScheduledBatch
from comtip_fast.data.upload import PackedTensors


@dataclass
class PreparedBatch:
    """A loaded batch, which may still have to be copied to the GPU, and whose views may have to be computed there."""

    scheduled: ScheduledBatch
    batch: Batch
    tiles_NSS3: Tensor | None = None
    """Tiles that were decoded on the GPU, from which ``batch.tiles`` has to be computed; None otherwise."""
    view_plan: ViewPlan | None = None
    """The views that have to be computed from the decoded tiles; None if there is nothing to compute."""
    packed: PackedTensors | None = None
    """Tensors of the batch and of the view plan, and tiles that were decoded on the host, in one buffer; None on a CPU, and for a
    batch of stem features."""
    faults: dict[int, ShardError] = field(default_factory=dict)
    """Errors of the damaged records that were replaced, by spot index."""


def uses_own_process(data: DataConfig, device: torch.device) -> bool:
    """Return whether ``torch`` and ``dali`` prepare batches in a process of their own (``data.loader_process``).

    ``auto`` does so for a GPU, whose steps need Python to launch operators; on a CPU, the step needs the cores itself.
    """
    if data.workers == 0 or data.loader_process == "training":
        return False
    return data.loader_process == "own" or device.type != "cpu"
