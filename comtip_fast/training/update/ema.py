"""Moving average of the trained weights (``optim.ema``), with which a run is validated and exported.

:class:`torch.optim.swa_utils.AveragedModel` has the same update, but reads its counter on the host and cannot leave out a step
that was skipped on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from comtip_fast.runtime import torch_internals

CHUNK_BYTES = 64 << 20
"""Size in bytes of the weights whose differences are in memory at once during an update."""


class WeightAverage:
    """Exponential moving average of the trained parameters, in their own precision (fp32) and on their device.

    Every rank holds the full average, computed from weights that are equal on all ranks. Parameters that have always been frozen
    have no average; the average of a parameter that thaws starts with the parameter's value.

    Parameters
    ----------
    decay
        ``optim.ema``; None keeps no average.
    """

    def __init__(self, decay: float | None) -> None:
        self.decay = decay
        self._averages: dict[str, Tensor] = {}
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []

    @torch.no_grad()
    def attach(self, module: nn.Module, stored: dict[str, Tensor] | None = None) -> None:
        """Start to average the trained parameters of a module, if ``optim.ema`` is set; called whenever an engine is built.

        Parameters
        ----------
        module
            The trained module, with its current weights.
        stored
            Averages of a checkpoint, by parameter name, which replace those of an earlier call. A parameter that has neither
            starts with its current weights.
        """
        if self.decay is None:
            return
        known = self._averages | (stored or {})
        weights = dict(module.named_parameters())
        names = [name for name, weight in weights.items() if weight.requires_grad or name in known]
        self._averages = {
            name: known[name].to(weights[name]) if name in known else weights[name].detach().clone() for name in names
        }
        self._pairs = []
        chunk_bytes = CHUNK_BYTES
        for name in names:
            average = self._averages[name]
            if chunk_bytes + average.nbytes > CHUNK_BYTES:
                self._pairs.append(([], []))
                chunk_bytes = 0
            self._pairs[-1][0].append(average)
            self._pairs[-1][1].append(weights[name])
            chunk_bytes += average.nbytes

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
            bool scalar on the device of the weights; if False, the averages do not change. None always updates them.
        """
        if self.decay is None:
            return
        share: float | Tensor = 1 - min(self.decay, (1 + step) / (10 + step))
        share = share if good is None else share * good
        for averages, weights in self._pairs:
            torch_internals.move_towards(averages, weights, share)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages by parameter name; empty without ``optim.ema``."""
        return self._averages

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Exchange the weights of the module and their averages inside the block, without a copy."""
        self._exchange(module)
        try:
            yield
        finally:
            self._exchange(module)

    def _exchange(self, module: nn.Module) -> None:
        """Exchange the storage of the module's weights and of their averages."""
        weights = dict(module.named_parameters())
        for name, average in self._averages.items():
            # `_pairs` refers to the same tensors, so they exchange their storage.
            weight = weights[name]
            weight.data, average.data = average.data, weight.data


@torch.no_grad()
def load_averages(module: nn.Module, averages: dict[str, Tensor]) -> None:
    """Overwrite the weights of a module with averages of :meth:`WeightAverage.tensors`."""
    weights = dict(module.named_parameters())
    for name, average in averages.items():
        weights[name].copy_(average)
