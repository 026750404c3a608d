"""Interface of engines, which run a training step in one process, with DDP or with DeepSpeed.

An engine owns the optimizer and the wrapper of the module. The loop calls the module only through :meth:`Engine.call`, so
that the hooks of DDP and ZeRO run, and passes this rank's *share* of the loss: engines sum gradients over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from comtip_fast.config.schema import RunConfig


class Engine(Protocol):
    """Runs training steps on a module."""

    name: str
    """Name in logs and checkpoints: ``single``, ``ddp``, ``zero1`` ..."""
    module: nn.Module
    """The trained module."""
    table_first: bool
    """With gradient caching, whether the first piece reads the sentence table (and so every parameter), or the last."""
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

    def update(self, finite: bool) -> float:
        """Clip and step, unless the loss (``finite``) or the gradient norm is not finite; return the gradient norm."""
        ...

    def summon_full_params(self) -> AbstractContextManager[Any]:
        """Return a context in which all parameters can be read and written in place."""
        ...

    def gathered_for_read(self) -> AbstractContextManager[Any]:
        """Return a context in which rank 0 can read the task's own module outside of steps; a collective call."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the full optimizer state, ``<parameter>/<entry>``, on rank 0's CPU; a collective call."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load the state that :meth:`optimizer_state` of any engine returned; called on every rank."""
        ...


class StepModule(nn.Module):
    """Wraps a module so that a function of the task runs inside one forward pass, where DDP and ZeRO hooks apply."""

    def __init__(self, trained: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.trained, self._autocast = trained, autocast

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(trained, *args)``."""
        with self._autocast():
            return function(self.trained, *args)


def autocast_of(config: RunConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that returns the autocast context of a forward pass; parameters and gradients stay fp32."""
    if in_bf16(config, device):
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


def in_bf16(config: RunConfig, device: torch.device) -> bool:
    """Return whether forward passes run in bf16."""
    wanted = config.train.precision
    return wanted == "bf16" or (wanted == "auto" and device.type == "cuda")


def set_product_precision(config: RunConfig, device: torch.device) -> None:
    """With bf16 training on a GPU, run the fp32 matrix products that autocast leaves (in the losses) as TF32."""
    if device.type == "cuda" and in_bf16(config, device):
        torch.set_float32_matmul_precision("high")


def clip(module: nn.Module, limit: float) -> float:
    """Clip the global gradient norm to ``limit`` (0: no clipping) and return it; a norm that is not finite clips nothing."""
    trained = [q for q in module.parameters() if q.grad is not None]
    norm = torch.nn.utils.get_total_norm([q.grad for q in trained if q.grad is not None])
    if limit and math.isfinite(float(norm)):
        torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return float(norm)
