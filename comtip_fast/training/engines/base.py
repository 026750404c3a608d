"""One seam between the loop and the ways to run a step: one process, DDP, or DeepSpeed (``engine_deepspeed``).

An engine owns the optimizer and whatever wraps the module. The loop calls the module only through :meth:`Engine.call`, so
that the hooks of DDP and ZeRO run, and hands over this rank's *share* of the loss: engines sum gradients over ranks.
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
    """Runs steps on a module."""

    name: str
    """As it is said to people: ``single``, ``ddp``, ``zero1`` ..."""
    module: nn.Module
    """What is trained."""
    table_first: bool
    """In which of a step's pieces the sentence table, and with it every parameter, is read: the first, or the last."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(module, *args)``, called inside the wrapped module's forward under the run's precision."""
        ...

    def start_step(self, rate: float) -> None:
        """Set the learning rate and forget gradients."""
        ...

    def piece(self, last: bool) -> AbstractContextManager[Any]:
        """Surround one forward and backward pass of a step; gradients are summed over ranks with the ``last``."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of the loss."""
        ...

    def update(self, finite: bool) -> float:
        """Clip and step, unless the norm or, as the caller says, the loss is not finite; return the gradients' norm."""
        ...

    def summon_full_params(self) -> AbstractContextManager[Any]:
        """Open the module's parameters for reading and writing in place."""
        ...

    def gathered_for_read(self) -> AbstractContextManager[Any]:
        """Surround what rank 0 reads from the task's own module outside of steps; every rank calls it."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state, ``<parameter>/<entry>``, whole, on rank 0's CPU; every rank calls it."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what any engine's :meth:`optimizer_state` gave, on every rank."""
        ...


class StepModule(nn.Module):
    """A module whose forward is a function of the task, so that everything a step does happens inside one forward."""

    def __init__(self, trained: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.trained, self._autocast = trained, autocast

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(trained, *args)``."""
        with self._autocast():
            return function(self.trained, *args)


def autocast_of(config: RunConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes the precision of a forward pass; parameters and their gradients stay fp32."""
    if in_bf16(config, device):
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


def in_bf16(config: RunConfig, device: torch.device) -> bool:
    """Say whether forward passes are in bf16."""
    wanted = config.train.precision
    return wanted == "bf16" or (wanted == "auto" and device.type == "cuda")


def set_product_precision(config: RunConfig, device: torch.device) -> None:
    """Let a GPU that trains in bf16 multiply on tensor cores, as tf32, what autocast leaves in fp32: the losses' vectors."""
    if device.type == "cuda" and in_bf16(config, device):
        torch.set_float32_matmul_precision("high")


def clip(module: nn.Module, limit: float) -> float:
    """Clip the gradients' global norm to ``limit`` (0 does not) and return it; what is not finite stays as it is."""
    trained = [q for q in module.parameters() if q.grad is not None]
    norm = torch.nn.utils.get_total_norm([q.grad for q in trained if q.grad is not None])
    if limit and math.isfinite(float(norm)):
        torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return float(norm)
