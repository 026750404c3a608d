"""A batch between its loader and the step, and where it is prepared."""

from __future__ import annotations

import multiprocessing
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
    """The views that have to be computed from the decoded tiles; None if there is nothing to compute. With ``packed``, the margins
    only."""
    packed: PackedTensors | None = None
    """Tensors of the batch and of the view plan, and tiles that were decoded on the host, in one buffer; None on a CPU, and for a
    batch of stem features."""
    faults: dict[int, ShardError] = field(default_factory=dict)
    """Errors of the damaged records that were replaced, by spot index."""


def uses_own_process(data: DataConfig, device: torch.device, loader: str) -> bool:
    """Return whether ``loader``, ``torch`` or ``dali``, prepares batches in a process of its own (``data.loader_process``).

    ``auto`` does so for ``dali`` and a GPU, whose steps need Python to launch operators. On a CPU, the step needs the cores itself. With
    ``torch``, decoded tiles of another process would have to be copied into pinned memory by the thread of the step. A daemonic
    process, such as a worker of a ``multiprocessing.Pool``, cannot start another one.
    """
    if data.workers == 0 or data.loader_process == "training":
        return False
    if data.loader_process == "own":
        return True
    return loader == "dali" and device.type != "cpu" and not multiprocessing.current_process().daemon
