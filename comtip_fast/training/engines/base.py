"""Interface of engines, which run a training step in one process, with DDP or with DeepSpeed.

An engine owns the optimizer and the wrapper of the module. The loop calls the module only through :meth:`Engine.call`, so
that the hooks of DDP and ZeRO run, and passes this rank's *share* of the loss: engines sum gradients over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from comtip_fast.config.schema import RunConfig
from comtip_fast.runtime import devices, torch_internals
from comtip_fast.runtime.weight_casts import ParameterNames, cast_together, linear_parameters
from comtip_fast.training.protocol import PartSource
from comtip_fast.training.update.ema import OwnWeights
from comtip_fast.training.update.spikes import SpikeLimit


@dataclass(frozen=True)
class Update:
    """Outcome of :meth:`Engine.update`, on the device until it is read."""

    norm: Tensor
    """Global gradient norm before clipping, scalar."""
    good: Tensor
    """bool scalar: whether the weights were updated. False if loss or norm is not finite, or if the step is a skipped spike."""
    names: tuple[str, ...] = ()
    """Names of the n parameters that have a gradient on this rank; empty if ``norms`` is None."""
    norms: Tensor | None = None
    """Norm of the gradient of each of ``names``, (n,); None if the engine does not compute them."""
    spike: Tensor | None = None
    """bool scalar: whether the norm exceeds its limit; None if ``optim.spike.policy`` is ``none``."""
    limit: Tensor | None = None
    """Limit on the norm, scalar; None if ``optim.spike.policy`` is ``none``."""

    def nonfinite(self) -> list[str]:
        """Return the names of the parameters whose gradient is not finite, empty without ``norms``; waits for the device."""
        if self.norms is None:
            return []
        return [name for name, ok in zip(self.names, self.norms.isfinite().tolist(), strict=True) if not ok]


@dataclass(frozen=True)
class ParameterPart:
    """The elements of one parameter that this rank owns, and their optimizer state."""

    name: str
    shape: tuple[int, ...]
    """Shape of the full parameter."""
    start: int
    """Index of the first own element in the flattened parameter."""
    tensors: dict[str, Tensor]
    """``weight``, for a trained parameter the moments, and in a checkpoint the average, if there is one; 1-D, of equal length, without
    padding. They may be live tensors of the engine."""
    step: float | None = None
    """Number of optimizer steps; None for a frozen parameter."""


class Shards(Protocol):
    """Access to this rank's part of the parameters, for an engine that divides them over ranks."""

    def parts(self) -> Iterator[ParameterPart]:
        """Yield this rank's part of every parameter; not a collective call."""
        ...

    def restore_weights(self, source: PartSource) -> None:
        """Replace the trained weights by those of ``source``; called on every rank before the first step."""
        ...


class Engine(Protocol):
    """Runs training steps of a module; owns its optimizer."""

    name: str
    """Name in logs and checkpoints: ``single``, ``ddp``, ``zero1`` ..."""
    module: nn.Module
    """The trained module."""
    table_first: bool
    """With gradient caching: whether the first piece (True) or the last (False) computes the sentence table, and therefore uses
    every parameter."""
    rebuilds: bool
    """Whether another engine can be built for the same module in this process, as when parameters thaw."""
    autocast: Callable[[], AbstractContextManager[Any]]
    """Returns the context that sets the run's precision, for losses that are computed outside of :meth:`call`."""
    shards: Shards | None
    """Access to this rank's part of the parameters; None if every rank holds all of them."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(module, *args)``, called inside the wrapped module's forward under the run's precision."""
        ...

    def start_step(self, rate: float) -> None:
        """Set the learning rate of the step and clear the gradients."""
        ...

    def piece(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context for the forward and backward pass of a piece; the ``last`` piece sums gradients over ranks."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of this rank's share of the loss."""
        ...

    def update(self, finite: Tensor | bool, spikes: SpikeLimit | None = None) -> Update:
        """Clip the gradients and update the weights.

        The weights do not change if the loss (``finite``) or the gradient norm is not finite, or if the step is a spike to skip.
        On a GPU, the update is masked on the device without a synchronization, except under ZeRO, which reads the norm on the host.
        """
        ...

    def elementwise(self) -> AbstractContextManager[Any]:
        """Return a context in which frozen parameters can be updated in place from parameters of the same shape.

        The update must treat every element alike, because the data of a parameter may be only the elements that this rank owns.
        """
        ...

    def own_weights(self) -> Iterator[OwnWeights]:
        """Yield what this rank owns of every parameter, for averaging; not a collective call."""
        ...

    def gathered_for_read(
        self,
        *,
        every_rank: bool = False,
        wanted: Callable[[str], bool] = lambda name: True,
        averages: Mapping[str, Tensor] | None = None,
    ) -> AbstractContextManager[Any]:
        """Return a context in which rank 0, or every rank, can read the weights in the task's module; a collective call.

        Parameters
        ----------
        every_rank
            Whether every rank reads; otherwise only rank 0.
        wanted
            If the engine divides parameters over ranks, only parameters whose name it accepts are gathered.
        averages
            Averages of the elements that this rank owns (:meth:`.ema.WeightAverage.tensors`), which are read instead of the
            weights; the training weights are unchanged after the context. None reads the weights.
        """
        ...

    def optimizer_state(self, *, every_rank: bool = False) -> dict[str, Tensor]:
        """Return the full optimizer state, ``<parameter>/<entry>``, on the CPU of rank 0 or of every rank; a collective call."""
        ...

    def restore(self, source: PartSource) -> None:
        """Replace the optimizer state by that of ``source``, saved under any engine; called on every rank before the first step.

        A rank reads what it owns. Parameters that are frozen, or of which ``source`` has no state, are left as they are.

        Raises
        ------
        TrainingError
            The engine updates some of the parameters together, but their step counts differ (ZeRO only).
        """
        ...

    def close(self) -> None:
        """Release hooks and optimizer state before another engine is built; called within :meth:`gathered_for_read`."""
        ...


class StepModule(nn.Module):
    """Wraps a module so that a function of the task runs inside one forward pass, where DDP and ZeRO hooks apply."""

    def __init__(
        self,
        trained: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]],
        cast_groups: Sequence[ParameterNames] = (),
    ) -> None:
        super().__init__()
        self.trained, self._autocast, self._cast_groups = trained, autocast, cast_groups

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(trained, *args)``, computed under autocast."""
        with self._autocast(), cast_together(self._cast_groups):
            return function(self.trained, *args)


def cast_groups_of(module: nn.Module, config: RunConfig, device: torch.device) -> list[ParameterNames]:
    """Return the trained fp32 parameters of the linear layers of each transformer block, which are cast to bf16 in one call.

    Blocks without such parameters are left out. The list is empty in fp32, for compiled blocks, which cast their weights
    themselves, and for a module without ``transformer_blocks``.
    """
    if not devices.in_bf16(config.train.precision, device) or config.engine.compile:
        return []
    blocks: Callable[[], Sequence[nn.Module]] | None = getattr(module, "transformer_blocks", None)
    return [] if blocks is None else [names for names in map(linear_parameters, blocks()) if names]


def autocast_of(config: RunConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that returns the autocast context of a forward pass; parameters and gradients stay fp32."""
    return lambda: devices.autocast(config.train.precision, device)


def set_product_precision(config: RunConfig, device: torch.device) -> None:
    """Use TF32 for the matrix products that remain in fp32 (those of the losses) if the run trains in bf16 on a GPU."""
    if device.type == "cuda" and devices.in_bf16(config.train.precision, device):
        torch.set_float32_matmul_precision("high")


def clip(
    parameters: Sequence[tuple[str, nn.Parameter]],
    limit: float,
    finite: Tensor | bool,
    spikes: SpikeLimit | None = None,
) -> Update:
    """Clip the gradients in place by their global norm; if the norm is not finite, they are not changed.

    Parameters
    ----------
    parameters
        Names and parameters of the module, including those without a gradient. A list is passed because a walk through the module
        takes the host about as long as the optimizer's step.
    limit
        Maximum norm; 0 disables clipping.
    finite
        Whether the loss is finite, a bool or a bool scalar on the device.
    spikes
        Limit above which a step is skipped or clipped; None for no limit.

    Returns
    -------
    Update
        ``good`` tells the caller whether to update the weights.
    """
    found = [(name, q.grad) for name, q in parameters]
    names = tuple(name for name, gradient in found if gradient is not None)
    gradients = [gradient for _, gradient in found if gradient is not None]
    norms = torch_internals.norms(gradients)
    norm = torch.linalg.vector_norm(norms)
    known = norm.isfinite()
    good, spike = known & finite, None
    # The gradients of a step that is not finite keep their values: the factor of a norm of 0 is 1.
    usable = norm.masked_fill(~known, 0.0) if limit or spikes is not None else norm
    if spikes is not None:
        spike = (norm > spikes.norm) & known
        good = good & ~spike if spikes.skip else good
    if spikes is not None and not spikes.skip:
        lower = spikes.norm.clamp(max=limit) if limit else spikes.norm
        _scale_to(gradients, 1.0, usable / lower)  # the limit is on the device
    elif limit:
        _scale_to(gradients, limit, usable)
    return Update(norm, good, names, norms, spike, None if spikes is None else spikes.norm)


def _scale_to(gradients: Sequence[Tensor], limit: float, norm: Tensor) -> None:
    """Scale gradients of the global norm ``norm`` to at most ``limit``, as ``torch.nn.utils.clip_grads_with_norm_``.

    PyTorch's function reads the gradients of all parameters again and sorts them by device and dtype.
    """
    if gradients:
        torch_internals.scale_all(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))


def exceeds(norm: Tensor, spikes: SpikeLimit) -> Tensor:
    """Return whether ``norm`` is finite and exceeds the limit, a bool scalar on the device."""
    return (norm > spikes.norm) & norm.isfinite()
