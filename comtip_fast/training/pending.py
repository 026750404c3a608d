"""Steps whose losses are still on the device.

If the host reads a loss, it waits for the GPU, and the GPU is then idle until the host launches the next step. Losses, gradient
norms and their finiteness therefore stay on the device, one record per step, until a row is logged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comtip_fast.training.engines.base import Update


@dataclass(frozen=True)
class PendingStep:
    """One training step: its batch, and results that are still on the device."""

    step: int
    epoch: int
    position: int
    """Position of the batch in the epoch."""
    spots: np.ndarray
    """Spot indices of the global batch."""
    rate: float
    """Learning rate."""
    shares: dict[str, Tensor]
    """This rank's shares of the losses, scalars."""
    numbers: dict[str, Any]
    """Numbers to log, floats or scalars on the device."""
    loss: Tensor
    """Loss of the global batch, a scalar."""
    update: Update


@dataclass(frozen=True)
class FinishedStep:
    """A pending step and its scalars, read into host memory."""

    pending: PendingStep
    loss: float
    norm: float
    """Gradient norm before clipping."""
    good: bool
    """Whether the weights were updated."""
    spike: bool = False
    limit: float = math.inf
    """Limit on the norm above which the step is a spike."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def read_steps(pending: list[PendingStep]) -> list[FinishedStep]:
    """Read the scalars of all pending steps in one transfer, empty the list, and return the finished steps."""
    if not pending:
        return []
    values = torch.stack([torch.stack(_scalars(p)) for p in pending]).tolist()
    out = [_finished(p, row) for p, row in zip(pending, values, strict=True)]
    pending.clear()
    return out


def _finished(pending: PendingStep, values: list[float]) -> FinishedStep:
    """Return a finished step from the values of :func:`_scalars`, read to the host."""
    loss, norm, good, *more = values
    spike, limit = more or (0.0, math.inf)
    return FinishedStep(pending, loss, norm, bool(good), bool(spike), limit)


def _scalars(pending: PendingStep) -> list[Tensor]:
    """Return loss, norm, ``good`` and, with ``optim.spike``, spike and limit of a step as scalars of one dtype."""
    update, like = pending.update, pending.loss
    spikes = [] if update.spike is None or update.limit is None else [update.spike, update.limit]
    return [like, *(value.to(like) for value in (update.norm, update.good, *spikes))]


def as_floats(values: dict[str, Any]) -> dict[str, float]:
    """Return the values as floats; tensors are read from the device."""
    return {name: float(value) for name, value in values.items()}
