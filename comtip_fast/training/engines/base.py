"""Interface of engines, which run a training step in one process, with DDP or with DeepSpeed.

An engine owns the optimizer and the wrapper of the module. The loop calls the module only through :meth:`Engine.call`, so
that the hooks of DDP and ZeRO run, and passes this rank's *share* of the loss: engines sum gradients over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from comtip_fast.config.schema import RunConfig
from comtip_fast.runtime import devices, torch_internals
from comtip_fast.runtime.weight_casts import ParameterNames, cast_together, linear_parameters
from comtip_fast.training.update.spikes import SpikeLimit


@dataclass(frozen=True)
class Update:
    """Outcome of :meth:`Engine.update`, on the device until it is read."""

    norm: Tensor
    """Global gradient norm before clipping, scalar."""
    good: Tensor
    """bool scalar: the weights were updated, because loss and norm are finite and the step is no spike that is skipped."""
    names: tuple[str, ...] = ()
    """Names of the parameters that have a gradient on this rank."""
    norms: Tensor | None = None
    """Norms of their gradients, (n,); None if the engine does not compute them."""
    spike: Tensor | None = None
    """bool scalar: the norm exceeds its limit; None without ``optim.spike``."""
    limit: Tensor | None = None
    """Limit on the norm, scalar; None without ``optim.spike``."""

    def nonfinite(self) -> list[str]:
        """Return the names of parameters whose gradient is not finite; waits for the device."""
        if self.norms is None:
            return []
        return [name for name, ok in zip(self.names, self.norms.isfinite().tolist(), strict=True) if not ok]


class Engine(Protocol):
    """Runs training steps on a module."""

    name: str
    """Name in logs and checkpoints: ``single``, ``ddp``, ``zero1`` ..."""
    module: nn.Module
    """The trained module."""
    table_first: bool
    """With gradient caching, whether the first piece computes the sentence table and so uses every parameter; otherwise
    the last one does."""
    autocast: Callable[[], AbstractContextManager[Any]]
    """Returns the context that sets the run's precision, for losses that are computed outside of :meth:`call`."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(module, *args)``, called inside the wrapped module's forward under the run's precision."""
        ...

    def start_step(self, rate: float) -> None:
        """Set the learning rate and clear gradients."""
        ...

    def piece(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context for one forward and backward pass; gradients are summed over ranks in the ``last`` one."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of this rank's share of the loss."""
        ...

    def update(self, finite: Tensor | bool, spikes: SpikeLimit | None = None) -> Update:
        """Clip and step, unless the loss (``finite``) or the gradient norm is not finite, or the step is a spike to skip.

        On a GPU, the update is masked on the device, without a synchronization.
        """
        ...

    def summon_full_params(self) -> AbstractContextManager[Any]:
        """Return a context in which all parameters can be read and written in place."""
        ...

    def gathered_for_read(self, *, every_rank: bool = False) -> AbstractContextManager[Any]:
        """Return a context in which rank 0, or every rank, can read the task's own module; a collective call."""
        ...

    def optimizer_state(self, *, every_rank: bool = False) -> dict[str, Tensor]:
        """Return the full optimizer state, ``<parameter>/<entry>``, on the CPU of rank 0 or of every rank; a collective call."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load the state that :meth:`optimizer_state` of any engine returned; called on every rank."""
        ...

    def close(self) -> None:
        """Release hooks and state, before another engine is built for the module; called within :meth:`gathered_for_read`."""
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
        """Return ``function(trained, *args)``."""
        with self._autocast(), cast_together(self._cast_groups):
            return function(self.trained, *args)


def cast_groups_of(module: nn.Module, config: RunConfig, device: torch.device) -> list[ParameterNames]:
    """Return the linear layers of each transformer block, whose weights are cast in one call; none if nothing is cast.

    Compiled blocks cast their weights themselves.
    """
    if not devices.in_bf16(config.train.precision, device) or config.engine.compile:
        return []
    blocks: Callable[[], Sequence[nn.Module]] | None = getattr(module, "transformer_blocks", None)
    return [] if blocks is None else [names for names in map(linear_parameters, blocks()) if names]


def autocast_of(config: RunConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that returns the autocast context of a forward pass; parameters and gradients stay fp32."""
    return lambda: devices.autocast(config.train.precision, device)


def set_product_precision(config: RunConfig, device: torch.device) -> None:
    """With bf16 training on a GPU, run the fp32 matrix products that autocast leaves (in the losses) as TF32."""
    if device.type == "cuda" and devices.in_bf16(config.train.precision, device):
        torch.set_float32_matmul_precision("high")


def clip(module: nn.Module, limit: float, finite: Tensor | bool, spikes: SpikeLimit | None = None) -> Update:
    """Clip the global gradient norm to ``limit`` (0: no clipping); a norm that is not finite clips nothing.

    Parameters
    ----------
    module
        Module with gradients.
    limit
        Maximum norm.
    finite
        Whether the loss is finite.
    spikes
        Limit above which a step is skipped or clipped; None for no limit.
    """
    named = [(name, q) for name, q in module.named_parameters() if q.grad is not None]
    trained = [q for _, q in named]
    norms = torch_internals.norms([q.grad for q in trained if q.grad is not None])
    norm = torch.linalg.vector_norm(norms)
    good = norm.isfinite() & finite
    names = tuple(name for name, _ in named)
    if spikes is not None:
        spike = exceeds(norm, spikes)
        if not spikes.skip:
            lower = spikes.norm.clamp(max=limit) if limit else spikes.norm
            # The limit is on the device and PyTorch's function takes a number, so the norm is divided by it.
            torch.nn.utils.clip_grads_with_norm_(trained, 1.0, (norm / lower).masked_fill(~norm.isfinite(), 0.0))
            return Update(norm, good, names, norms, spike, spikes.norm)
        good = good & ~spike
    if limit:
        # The gradients of a step that is not finite keep their values: the factor of a norm of 0 is 1.
        torch.nn.utils.clip_grads_with_norm_(trained, limit, norm.masked_fill(~norm.isfinite(), 0.0))
    return Update(norm, good, names, norms) if spikes is None else Update(norm, good, names, norms, spike, spikes.norm)


def exceeds(norm: Tensor, spikes: SpikeLimit) -> Tensor:
    """Return whether a finite norm exceeds the limit, bool scalar on the device."""
    return (norm > spikes.norm) & norm.isfinite()
