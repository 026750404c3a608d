"""Interface between the training loop, which knows nothing of CoMTIP, and a task, which knows nothing of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn


class TrainingError(ValueError):
    """Training cannot start or continue. The message names the problem, its location and the fix."""


@dataclass(frozen=True)
class Extension:
    """Shard sets that were appended to the data of a run when it resumed."""

    step: int
    """Last step before the extension."""
    epoch: int
    """First epoch over all sets; it begins at the next step."""
    sets: tuple[str, ...]
    """Digest of the manifest of each appended set, in their order in ``data.shards``."""


@dataclass
class StepCost:
    """Estimated cost of a step, by the formulas of ``comtip plan``, and the peak rate of the device."""

    flops: Callable[[int, int], float]
    """FLOPs of a step on this rank, given the spots of the global batch and the genes of the panel."""
    peak: float | None = None
    """Peak FLOP/s of the device in the run's precision; None if unknown, as for CPUs."""


ValidationResult = tuple[float, dict[str, float], dict[str, float]]
"""Score for early stopping (higher is better), its parts, and further numbers to log."""


WEIGHT, MOMENTS, AVERAGE = "weight", ("exp_avg", "exp_avg_sq"), "average"
"""Keys of the values of a parameter, of its moments in AdamW's state, and of its moving average (``optim.ema``)."""


class PartSource(Protocol):
    """Reads elements of parameters and of their optimizer state, for example from a checkpoint.

    All ranks read the same keys of the same parameters in the same order, because rank 0 may send them; the elements may differ.
    """

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor | None:
        """Return elements ``start`` to ``stop`` of the flattened ``key`` of a parameter, 1-D; None if there is no such state."""
        ...

    def step_of(self, name: str) -> float:
        """Return the number of optimizer steps of a parameter; 0 if it was frozen."""
        ...


class TrainingTask(Protocol):
    """Data, model and losses: everything that the training loop needs of a task."""

    @property
    def module(self) -> nn.Module:
        """All parameters and buffers; validation and export read this module."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Return hashes of the input data by name; a run may resume only if they have not changed."""
        ...

    def note_extensions(self, extensions: Sequence[Extension]) -> None:
        """Take note of all extensions of the run, which an export records; called before the first batch, if there are any."""
        ...

    def prepare(self) -> None:
        """Do slow work that batches need; called once before the first batch, unless training is already complete."""
        ...

    def close(self) -> None:
        """Stop background loading; a later request for a batch starts it again."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return loader statistics, which are logged with the losses; a collective call."""
        ...

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's global batches, int64 arrays of spot indices: a pure function of (seed, epoch)."""
        ...

    def batch(self, spot_index: np.ndarray, step: int, epoch: int) -> Any:
        """Load this rank's share of one global batch."""
        ...

    def losses(self, module: nn.Module, batch: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return ``{"loss": total, part: ...}`` and numbers to log.

        ``module`` is the trained module: :attr:`module`, or the engine's copy of it. The losses are this rank's shares;
        their sum over ranks is the loss of the global batch. Numbers are floats, or scalar tensors that are read when logged.
        """
        ...

    def after_step(self, module: nn.Module, step: int, good: Tensor | None = None) -> None:
        """Update the task after an optimizer step, for example a moving average.

        Buffers may change as needed, frozen parameters only elementwise (:meth:`.engines.base.Engine.elementwise`).
        ``good`` is a bool scalar on the device; if it is False, the weights were not updated and the task must not change. On a
        CPU, the method is called without ``good``, and only after steps that updated the weights.
        """
        ...

    def is_validated(self, name: str) -> bool:
        """Return whether a validation reads the parameter ``name`` of :attr:`module`."""
        ...

    def validation_share(self, progress: Callable[[str], None]) -> Any:
        """Return this rank's share of a validation, small and picklable; called on every rank, not a collective call.

        The task calls ``progress`` with a description of its current work, which resets the watchdog.
        """
        ...

    def validation_result(self, shares: list[Any]) -> ValidationResult:
        """Combine the shares of all ranks, in rank order; called on rank 0."""
        ...

    def export(self, folder: Path) -> None:
        """Write an export of the current weights to ``folder``; called on rank 0."""
        ...
