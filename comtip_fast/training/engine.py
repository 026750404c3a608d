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
from torch.nn.parallel import DistributedDataParallel

from comtip_fast.collectives import Group
from comtip_fast.config.schema import RunConfig
from comtip_fast.training.comm_clock import clock_of
from comtip_fast.training.optim import make_optimizer, optimizer_tensors, restore_optimizer
from comtip_fast.training.protocol import TrainingError


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

    def writable(self) -> AbstractContextManager[Any]:
        """Open the module's parameters for reading and writing in place."""
        ...

    def at_home(self) -> AbstractContextManager[Any]:
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


class TorchEngine:
    """One process, or PyTorch's DistributedDataParallel over several."""

    def __init__(self, module: nn.Module, config: RunConfig, group: Group) -> None:
        self.module, self.config, self.group = module, config, group
        self.name = "single" if group.size == 1 else "ddp"
        # DDP waits for every parameter in the pass that is reduced, the last.
        self.table_first = False
        device = next(module.parameters()).device
        self._clock = clock_of(group, device)
        self.optimizer = make_optimizer(module, config.optim)
        self._step: nn.Module = StepModule(module, autocast_of(config, device))
        if group.size > 1:
            self._step = DistributedDataParallel(
                self._step, bucket_cap_mb=config.engine.bucket_mb, gradient_as_bucket_view=True
            )
            # Set, as the argument's name depends on PyTorch's version: no rank changes buffers by itself.
            self._step.broadcast_buffers = False

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """See :meth:`Engine.call`."""
        return self._step(function, *args)

    def start_step(self, rate: float) -> None:
        """See :meth:`Engine.start_step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)

    def piece(self, last: bool) -> AbstractContextManager[Any]:
        """See :meth:`Engine.piece`."""
        if last or not isinstance(self._step, DistributedDataParallel):
            return nullcontext()
        return self._step.no_sync()

    def backward(self, loss: Tensor) -> None:
        """See :meth:`Engine.backward`; DDP averages, so the share is multiplied by the number of ranks."""
        if self.group.size == 1:
            loss.backward()
            return
        loss = loss * self.group.size
        with self._clock.after_backward(loss):
            loss.backward()

    def update(self, finite: bool) -> float:
        """See :meth:`Engine.update`. Scaling by a norm of NaN would make every gradient NaN and hide the first one."""
        norm = clip(self.module, self.config.optim.clip)
        if finite and math.isfinite(norm):
            self.optimizer.step()
        return norm

    def writable(self) -> AbstractContextManager[Any]:
        """Every rank holds every parameter."""
        return nullcontext()

    def at_home(self) -> AbstractContextManager[Any]:
        """Do nothing: the task's module is the one that is trained."""
        return nullcontext()

    def optimizer_state(self) -> dict[str, Tensor]:
        """See :meth:`Engine.optimizer_state`."""
        return optimizer_tensors(self.module, self.optimizer) if self.group.rank == 0 else {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See :meth:`Engine.restore`."""
        restore_optimizer(self.module, self.optimizer, tensors)


def clip(module: nn.Module, limit: float) -> float:
    """Clip the gradients' global norm to ``limit`` (0 does not) and return it; what is not finite stays as it is."""
    trained = [q for q in module.parameters() if q.grad is not None]
    norm = torch.nn.utils.get_total_norm([q.grad for q in trained if q.grad is not None])
    if limit and math.isfinite(float(norm)):
        torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return float(norm)


def check_engine(config: RunConfig, device: torch.device) -> None:
    """Refuse, before anything slow is done, an engine that lacks something on this machine.

    Raises
    ------
    TrainingError
        Says what is missing.
    """
    if config.engine.kind == "deepspeed":
        from comtip_fast.training.engine_deepspeed import check_deepspeed

        check_deepspeed(config, device)


def make_engine(module: nn.Module, config: RunConfig, group: Group) -> Engine:
    """Return the engine that the config asks for; ``module`` already holds the weights to start from.

    Raises
    ------
    TrainingError
        ``engine.kind`` does not fit the number of processes, or DeepSpeed is not there.
    """
    kind = config.engine.kind
    if kind == "single" and group.size > 1:
        raise TrainingError(f"engine.kind=single, but {group.size} processes were launched; use auto, ddp or deepspeed")
    if kind == "deepspeed":
        from comtip_fast.training.engine_deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, config, group)
    return TorchEngine(module, config, group)
