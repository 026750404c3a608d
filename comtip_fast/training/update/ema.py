"""Moving average of the trained weights (``optim.ema``), with which a run is validated and exported.

:class:`torch.optim.swa_utils.AveragedModel` has the same update, but reads its counter on the host and cannot leave out a step
that was skipped on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from comtip_fast.runtime import torch_internals
from comtip_fast.training.protocol import AVERAGE, PartSource

CHUNK_BYTES = 64 << 20
"""Size in bytes of the weights whose differences are in memory at once during an update."""


@dataclass(frozen=True)
class OwnWeights:
    """The elements of one parameter that this rank owns, and therefore averages."""

    name: str
    trained: bool
    """Whether the parameter is trained; False if it is frozen."""
    tensor: Tensor
    """Live weights: the parameter itself, or this rank's shard of the flattened parameter, 1-D and padded at its end."""
    start: int
    """Index of the first own element in the flattened parameter."""
    length: int
    """Number of own elements, without padding."""
    loaded: Callable[[], AbstractContextManager[Any]] | None = None
    """Returns a context in which ``tensor`` can be read, if the elements are in a file between steps; otherwise None."""

    @property
    def reading(self) -> Callable[[], AbstractContextManager[Any]]:
        """Return the function whose context makes ``tensor`` readable."""
        return self.loaded or nullcontext


def whole_weights(module: nn.Module) -> Iterator[OwnWeights]:
    """Yield the parameters of a module of which every rank owns all elements."""
    for name, parameter in module.named_parameters():
        yield OwnWeights(name, parameter.requires_grad, parameter, 0, parameter.numel())


@dataclass(frozen=True)
class _Chunk:
    """Averages and weights that are updated together; all on one device."""

    reading: Callable[[], AbstractContextManager[Any]]
    averages: list[Tensor]
    weights: list[Tensor]

    def takes(self, weight: OwnWeights, average: Tensor) -> bool:
        """Return whether a further average can be updated together with these."""
        fits = sum(a.nbytes for a in self.averages) + average.nbytes <= CHUNK_BYTES
        return fits and weight.reading == self.reading and average.device == self.averages[0].device


class WeightAverage:
    """Exponential moving average of the trained parameters, in their own precision (fp32) and on their device.

    A rank averages the elements that its engine says it owns (:meth:`.engines.base.Engine.own_weights`): under ZeRO 3 its shards, otherwise all,
    computed from weights that are equal on all ranks. No step communicates. Parameters that have always been frozen have no average;
    the average of a parameter that thaws starts with the parameter's value.

    Parameters
    ----------
    decay
        ``optim.ema``; None keeps no average.
    """

    def __init__(self, decay: float | None) -> None:
        self.decay = decay
        self._averages: dict[str, Tensor] = {}
        self._chunks: list[_Chunk] = []

    @torch.no_grad()
    def attach(self, own: Iterable[OwnWeights], source: PartSource | None = None) -> None:
        """Start to average the trained parameters, if ``optim.ema`` is set; called whenever an engine is built.

        Parameters
        ----------
        own
            What this rank owns of every parameter, with the current weights.
        source
            Checkpoint whose averages replace those of an earlier call. A parameter that has neither starts with its current
            weights. If there are several ranks, all of them call this method with the same checkpoint.
        """
        if self.decay is None:
            return
        earlier, self._averages, self._chunks = self._averages, {}, []
        for weight in own:
            average = _first(weight, earlier.get(weight.name), source)
            if average is None:
                continue
            self._averages[weight.name] = average
            if not self._chunks or not self._chunks[-1].takes(weight, average):
                self._chunks.append(_Chunk(weight.reading, [], []))
            self._chunks[-1].averages.append(average)
            self._chunks[-1].weights.append(weight.tensor)

    @torch.no_grad()
    def update(self, step: int, good: Tensor | None = None) -> None:
        """Move the averages towards the weights after a step; without ``optim.ema``, do nothing.

        The decay rises with the step as ``(1 + step) / (10 + step)``, up to ``optim.ema``, so that the initial weights soon have
        little influence.

        Parameters
        ----------
        step
            Optimizer step, counted from 1.
        good
            bool scalar on the device of the run; if False, the averages do not change. None always updates them.
        """
        if self.decay is None:
            return
        share: float | Tensor = 1 - min(self.decay, (1 + step) / (10 + step))
        share = share if good is None else share * good
        for chunk in self._chunks:
            # Weights that are offloaded to the host are averaged there.
            near = share.to(chunk.averages[0].device) if isinstance(share, Tensor) else share
            with chunk.reading():
                torch_internals.move_towards(chunk.averages, chunk.weights, near)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages of the elements that this rank owns, shaped as :attr:`OwnWeights.tensor`, by parameter name.

        Empty without ``optim.ema``.
        """
        return self._averages


def _first(weight: OwnWeights, earlier: Tensor | None, source: PartSource | None) -> Tensor | None:
    """Return the average with which a parameter starts; None for a parameter that has always been frozen."""
    stop = weight.start + weight.length
    stored = None if source is None else source.read(weight.name, AVERAGE, weight.start, stop)
    if stored is None and earlier is not None:
        return earlier.to(weight.tensor)
    if stored is None and not weight.trained:
        return None
    with weight.reading():
        average = weight.tensor.detach().clone(memory_format=torch.contiguous_format)
    if stored is not None:
        average.view(-1)[: weight.length].copy_(stored)
    return average


@contextmanager
def exchanged(module: nn.Module, averages: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Exchange weights of a module and their averages inside the block, without a copy.

    Parameters
    ----------
    module
        Module of which every rank holds all weights.
    averages
        Averages of :meth:`WeightAverage.tensors`; None exchanges nothing.
    """
    _exchange(module, averages or {})
    try:
        yield
    finally:
        _exchange(module, averages or {})


def _exchange(module: nn.Module, averages: Mapping[str, Tensor]) -> None:
    """Exchange the storage of weights of a module and of their averages, whose other references see the exchange, too."""
    weights = dict(module.named_parameters()) if averages else {}
    for name, average in averages.items():
        weight = weights[name]
        weight.data, average.data = average.data, weight.data


@torch.no_grad()
def load_averages(module: nn.Module, averages: dict[str, Tensor]) -> None:
    """Overwrite the weights of a module with the averages of a checkpoint."""
    weights = dict(module.named_parameters())
    for name, average in averages.items():
        weights[name].copy_(average)
