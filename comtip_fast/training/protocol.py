"""What the loop asks of a task. The loop knows nothing of CoMTIP; a task knows nothing of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn


class TrainingError(ValueError):
    """Training cannot start or go on; says where and what to do."""


class TrainingTask(Protocol):
    """Data, model and losses behind one seam."""

    @property
    def module(self) -> nn.Module:
        """All parameters and buffers; what validation and export read."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Hashes of what the run reads; a resumed run must find the same."""
        ...

    def prepare(self) -> None:
        """Do what must be done once before the first batch; not called where nothing is left to train."""
        ...

    def close(self) -> None:
        """Stop what reads ahead; asked for another batch, the task starts it again."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return numbers of the data since the last call, to log beside the losses; called on every rank at once."""
        ...

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's batches as spot indices: a pure function of (seed, epoch)."""
        ...

    def batch(self, spot_index: np.ndarray, step: int, epoch: int) -> Any:
        """Make this rank's share of one batch."""
        ...

    def losses(self, module: nn.Module, batch: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return ``{"loss": total, part: ...}`` and plain numbers to log.

        ``module`` is the one that is trained: :attr:`module`, or what an engine made of a copy of it. The losses are
        this rank's shares: summed over ranks they are the batch's.
        """
        ...

    def after_step(self, module: nn.Module, step: int) -> None:
        """Follow an optimizer step (moving averages)."""
        ...

    def validate(self) -> tuple[float, dict[str, float], dict[str, float]]:
        """Return the score that stops training (higher is better), its parts, and further numbers to log."""
        ...

    def export(self, folder: Path) -> None:
        """Write what users of the model load, from the weights as they are now."""
        ...
