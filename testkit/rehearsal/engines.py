"""Stand-ins for DDP and DeepSpeed with the same order of calls, but without the operators of these engines.

DDP's reducer and DeepSpeed's partitioned optimizers need tensors with storage. Their buckets, copies and fused updates are not
code of this project; the rehearsal covers the model and the losses with these engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from comtip_fast.training.engines import deepspeed as deepspeed_engine
from comtip_fast.training.engines import torch as torch_engine
from testkit.rehearsal.stand_in import CUDA, StandInMode

LEFT_OUT = ("DistributedDataParallel.Reducer", "deepspeed.DeepSpeedZeroOptimizer")
"""Parts of other projects whose operators are not counted."""


class StandInDDP(nn.Module):
    """DDP without its reducer; in the last backward pass of a step, one all-reduce is counted per bucket."""

    mode: StandInMode

    def __init__(self, module: nn.Module, *, bucket_cap_mb: float, **_options: Any) -> None:
        super().__init__()
        self.module, self._cap = module, bucket_cap_mb * 2**20
        self._sync, self._filled = True, 0.0
        trained = [p for p in module.parameters() if p.requires_grad]
        self._total = sum(p.numel() * p.element_size() for p in trained)
        self._seen = 0
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._ready)

    def forward(self, *args: Any) -> Any:
        """Call the module."""
        return self.module(*args)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without reducing them."""
        self._sync = False
        try:
            yield
        finally:
            self._sync = True

    def _ready(self, parameter: Tensor) -> None:
        if not self._sync:
            return
        size = parameter.numel() * parameter.element_size()
        self._filled += size
        self._seen += size
        if self._filled >= self._cap or self._seen == self._total:
            if not self.mode.record.paused:
                self.mode.record.collectives["ddp::all_reduce"] += 1
                self.mode.record.sent["ddp::all_reduce"] += int(self._filled)
            self._filled = 0.0
        if self._seen == self._total:
            self._seen = 0


class StandInDeepSpeed:
    """DeepSpeed's engine without its optimizer: forward and backward passes, and the gradient norm that the host reads."""

    def __init__(self, model: nn.Module, optimizer: Any, **_options: Any) -> None:
        self.module = model
        self.optimizer = SimpleNamespace(param_groups=optimizer.param_groups, _global_grad_norm=None)

    def __call__(self, *args: Any) -> Any:
        """Run the forward pass."""
        return self.module(*args)

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        """Do nothing: the stand-in reduces no gradients."""

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        loss.backward()

    def step(self) -> None:
        """Clear gradients, as DeepSpeed does after its update, and set the gradient norm to a tensor on the device."""
        for parameter in self.module.parameters():
            parameter.grad = None
        self.optimizer._global_grad_norm = torch.empty((), device=CUDA)

    def zero_grad(self) -> None:
        """Clear gradients."""
        self.module.zero_grad()


@contextmanager
def stand_in_engines(mode: StandInMode) -> Iterator[None]:
    """Replace DDP and DeepSpeed by the stand-ins inside the block."""
    ddp = type("StandInDDP", (StandInDDP,), {"mode": mode})
    module = SimpleNamespace(
        initialize=lambda model, optimizer, **options: (StandInDeepSpeed(model, optimizer, **options),),
        comm=SimpleNamespace(comm=SimpleNamespace(cdb=SimpleNamespace())),
        utils=SimpleNamespace(),  # its functions read parts of checkpoints, which are not walked
    )
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch_engine, "DistributedDataParallel", ddp))
        stack.enter_context(mock.patch.object(deepspeed_engine, "_import", return_value=module))
        stack.enter_context(mock.patch.object(deepspeed_engine.internals, "create_moments"))
        # The stand-in does not divide parameters; ZeRO 3's update of its parts sends nothing either.
        stack.enter_context(mock.patch.object(deepspeed_engine.Zero3Shards, "elementwise", return_value=nullcontext()))
        yield
