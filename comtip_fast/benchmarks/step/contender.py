"""Interface of the training steps that ``comtip bench step`` compares (its contenders), and this project's step."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comtip_fast.benchmarks.step.clock import PartClock, wrapped
from comtip_fast.training import losses
from comtip_fast.training.engines.base import clip
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.optim import make_optimizer
from comtip_fast.training.task import CoMTIPTask

LOADER_AHEAD = 3
"""Batches that loaders prepare beyond ``data.prefetch``, at most: two in slots of a loader's process, or in DALI, and one in progress."""


class StepContender(ABC):
    """Base class of a training step to compare: all such steps train on the spots of one shard set, in the same order."""

    name: str

    def __init__(self, task: CoMTIPTask) -> None:
        self.task, self.config, self.device = task, task.config, task.device
        self.clock = PartClock(task.device)

    @property
    def prepared_ahead(self) -> int:
        """Most batches that :meth:`load` can return without waiting, because background work has prepared them; by default none."""
        return 0

    @abstractmethod
    def load(self) -> Any:
        """Return the next batch on the device."""

    @abstractmethod
    def train(self, batch: Any) -> Tensor:
        """Run forward, backward and optimizer, and return the loss."""

    def n_samples(self, batch: Any) -> int:
        """Return the number of spots of a batch of :meth:`load`."""
        return int(batch.spot_index.numel())

    def clear_gradients(self) -> None:  # noqa: B027 - most contenders clear their gradients at the end of a step
        """Free the gradients that a step leaves in memory for the next one to free."""

    def close(self) -> None:  # noqa: B027 - not every contender has worker processes
        """Stop worker processes."""

    def timed(self) -> AbstractContextManager[Any]:
        """Return the context in which parts are timed; by default an empty one, for steps whose own code times the parts."""
        return nullcontext()

    def scheduled(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """Yield the spots, step and epoch of every batch, indefinitely."""
        step = 0
        for epoch in itertools.count():
            for spots in self.task.batches(epoch):
                step += 1
                yield spots, step, epoch


class Ours(StepContender):
    """The step of ``comtip pretrain``: its loader, model, losses, engine and optimizer."""

    name = "comtip"

    def __init__(self, task: CoMTIPTask) -> None:
        super().__init__(task)
        self.engine = make_engine(task.module, task.config, task.group)
        self._batches, self._step = self.scheduled(), 0

    @property
    def prepared_ahead(self) -> int:
        """See :attr:`StepContender.prepared_ahead`."""
        data = self.config.data
        return data.prefetch + LOADER_AHEAD if data.workers else 0

    def load(self) -> Any:
        """See :meth:`StepContender.load`."""
        spots, self._step, epoch = next(self._batches)
        with self.clock.part("loader"):
            return self.task.batch(spots, self._step, epoch)

    def train(self, batch: Any) -> Tensor:
        """See :meth:`StepContender.train`."""
        with self.clock.part("optimizer"):
            self.engine.start_step(self.config.optim.lr)
        shares, _ = forward_backward(self.engine, self.task, batch, self.config.engine.micro_batches)
        self.clock.end_backward()
        loss = shares["loss"]
        with self.clock.part("optimizer"):
            update = self.engine.update(loss.isfinite())
            self.task.after_step(self.engine.module, self._step, update.good)
        return loss

    def clear_gradients(self) -> None:
        """See :meth:`StepContender.clear_gradients`."""
        self.engine.module.zero_grad(set_to_none=True)

    def close(self) -> None:
        """See :meth:`StepContender.close`."""
        self.task.close()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time the functions that compute the parts of a step while they are called inside the block."""
        model, step = self.task.model, self.task.step

        def of_vision(_features: Tensor, visible: Tensor | None = None, with_all: bool = False) -> str:
            return "vision both" if with_all else "vision full" if visible is None else "vision masked"

        functions: list[tuple[Any, str, Any]] = [
            (model, "project_tokens", "vision full"),
            (model.vision, "forward", of_vision),
            (model.vision, "stem_features", "vision full"),
            (model.generator, "forward", "vision masked"),
            (losses, "masked_feature_loss", "vision masked"),
            (model, "sentence_table", "table"),
            (losses, "table_pool", "pooling"),
            (step, "_mispair", "mispairing"),
            (losses, "global_infonce", "InfoNCE"),
            (losses, "level_cross_entropy", "level"),
            (step, "_pair", "pair"),
        ]
        functions += [
            (self.task.group, name, "communication") for name in ("gather_rows", "scatter_rows", "sum", "max")
        ]
        with ExitStack() as stack:
            for owner, attribute, name in functions:
                stack.enter_context(wrapped(self.clock, owner, attribute, name))
            yield


class Updater:
    """AdamW and gradient clipping with the run's settings, for the models of the other steps."""

    def __init__(self, module: torch.nn.Module, task: CoMTIPTask) -> None:
        self.parameters, self.limit = list(module.named_parameters()), task.config.optim.clip
        self.optimizer = make_optimizer(module, task.config.optim, fused=task.device.type == "cuda")

    def step(self) -> None:
        """Clip the gradients, update the weights and clear the gradients."""
        clip(self.parameters, self.limit, True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
