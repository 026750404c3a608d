"""Engine for one process, and for several processes with PyTorch's DistributedDataParallel (DDP)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from comtip_fast.collectives import Group
from comtip_fast.config.schema import RunConfig
from comtip_fast.runtime import devices, torch_internals
from comtip_fast.training.distributed.comm_timer import clock_of
from comtip_fast.training.engines.base import Shards, StepModule, Update, autocast_of, cast_groups_of, clip
from comtip_fast.training.masked_adamw import MaskedAdamW
from comtip_fast.training.optim import make_optimizer, optimizer_tensors, restore_optimizer, set_rate
from comtip_fast.training.protocol import PartSource
from comtip_fast.training.update.ema import OwnWeights, exchanged, whole_weights
from comtip_fast.training.update.spikes import SpikeLimit


class TorchEngine:
    """Runs steps in one process, or with PyTorch's DistributedDataParallel if the group has several ranks."""

    def __init__(self, module: nn.Module, config: RunConfig, group: Group) -> None:
        self.module, self.config, self.group = module, config, group
        self.name = "single" if group.size == 1 else "ddp"
        self.shards: Shards | None = None
        # DDP waits for every parameter in the pass that reduces gradients, which is the last one.
        self.table_first, self.rebuilds = False, True
        device = next(module.parameters()).device
        self._clock = clock_of(group, device)
        self._masked = not devices.reads_are_free(device)
        self._parameters = list(module.named_parameters())
        self.optimizer = make_optimizer(module, config.optim, masked=self._masked)
        self.autocast = autocast_of(config, device)
        self._step: nn.Module = StepModule(module, self.autocast, cast_groups_of(module, config, device))
        if group.size > 1:
            if config.engine.compile:
                torch_internals.keep_blocks_whole()
            self._step = DistributedDataParallel(
                self._step, bucket_cap_mb=config.engine.bucket_mb, gradient_as_bucket_view=True
            )
            # Set as an attribute because the argument's name depends on PyTorch's version. Buffers are equal on all ranks.
            self._step.broadcast_buffers = False

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """See :meth:`Engine.call`."""
        return self._step(function, *args)

    def start_step(self, rate: float) -> None:
        """See :meth:`Engine.start_step`."""
        set_rate(self.optimizer, rate)
        for _, parameter in self._parameters:  # zero_grad takes several times as long
            parameter.grad = None

    def piece(self, last: bool) -> AbstractContextManager[Any]:
        """See :meth:`Engine.piece`."""
        if last or not isinstance(self._step, DistributedDataParallel):
            return nullcontext()
        return self._step.no_sync()

    def backward(self, loss: Tensor) -> None:
        """See :meth:`Engine.backward`; DDP averages gradients, so the share is multiplied by the number of ranks."""
        if self.group.size == 1:
            loss.backward()
            return
        loss = loss * self.group.size
        with self._clock.after_backward(loss):
            loss.backward()

    def update(self, finite: Tensor | bool, spikes: SpikeLimit | None = None) -> Update:
        """See :meth:`Engine.update`."""
        update = clip(self._parameters, self.config.optim.clip, finite, spikes)
        if isinstance(self.optimizer, MaskedAdamW):
            self.optimizer.masked_step(update.good)
        elif bool(update.good):
            self.optimizer.step()
        return update

    def elementwise(self) -> AbstractContextManager[Any]:
        """Do nothing: every rank holds every parameter."""
        return nullcontext()

    def own_weights(self) -> Iterator[OwnWeights]:
        """See :meth:`Engine.own_weights`; every rank owns every parameter."""
        return whole_weights(self.module)

    def gathered_for_read(
        self,
        *,
        every_rank: bool = False,
        wanted: Callable[[str], bool] = lambda name: True,
        averages: Mapping[str, Tensor] | None = None,
    ) -> AbstractContextManager[Any]:
        """See :meth:`Engine.gathered_for_read`; nothing is gathered, because the task's module is the trained module."""
        return exchanged(self.module, averages)

    def optimizer_state(self, *, every_rank: bool = False) -> dict[str, Tensor]:
        """See :meth:`Engine.optimizer_state`."""
        return optimizer_tensors(self.module, self.optimizer) if every_rank or self.group.rank == 0 else {}

    def restore(self, source: PartSource) -> None:
        """See :meth:`Engine.restore`."""
        restore_optimizer(self.module, self.optimizer, source)

    def close(self) -> None:
        """See :meth:`Engine.close`; releases the wrapper of DDP, which holds its hooks."""
        self._step = self.module
        self.optimizer.zero_grad(set_to_none=True)
