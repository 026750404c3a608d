"""AdamW for runs whose weights are updated without a read on the host.

PyTorch's fused AdamW collects parameters, gradients and state of every group in each step, and adds 1 to a step counter per
parameter. :class:`MaskedAdamW` calls the same kernels, but keeps these lists, and parameters that have been updated equally often
share one counter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comtip_fast.runtime import torch_internals


@dataclass
class _Lists:
    """Parameters of one group, and their state in the same order."""

    group: dict[str, Any]
    parameters: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    counters: list[Tensor]


class MaskedAdamW(torch.optim.AdamW):
    """Fused AdamW that updates nothing, and counts no step, where a flag on the device is False.

    Weights, moments and counts equal those of ``torch.optim.AdamW(fused=True)`` bit for bit. All parameters must be on one device
    and have one dtype.

    Parameters
    ----------
    groups
        Parameter groups, as for AdamW.
    lr, betas
        As for AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self._lists: list[_Lists] = []

    def forget(self) -> None:
        """Collect the state again in the next step; called after ``state`` has been changed."""
        self._lists = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; ``closure`` is not supported and must be None."""
        assert closure is None
        device = self.param_groups[0]["params"][0].device
        self.masked_step(torch.ones((), dtype=torch.bool, device=device))

    @torch.no_grad()
    def masked_step(self, good: Tensor) -> None:
        """Update all parameters that have a gradient.

        Parameters
        ----------
        good
            bool scalar on the device of the parameters; if False, the step changes nothing.
        """
        if not self._lists:
            self._collect()
        found = [[p.grad for p in lists.parameters] for lists in self._lists]
        if any(gradient is None for gradients in found for gradient in gradients):
            self._separate_counters()
        parts = [_with_gradient(lists, own) for lists, own in zip(self._lists, found, strict=True)]
        counters = list({id(c): c for lists, _ in parts for c in lists.counters}.values())
        if not counters:
            return
        torch_internals.add_to_all(counters, good.float())
        bad = (~good).float()
        for lists, gradients in parts:
            if gradients:
                torch_internals.fused_adamw(
                    lists.parameters,
                    gradients,
                    lists.averages,
                    lists.squares,
                    lists.counters,
                    lr=lists.group["lr"],
                    betas=lists.group["betas"],
                    weight_decay=lists.group["weight_decay"],
                    eps=lists.group["eps"],
                    skip=bad,
                )

    def _collect(self) -> None:
        """List the parameters and their state; state that is missing is created, with one counter for all."""
        new: Tensor | None = None
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    new = torch.zeros((), dtype=torch.float32, device=p.device) if new is None else new
                    moments = (torch.zeros_like(p, memory_format=torch.preserve_format) for _ in range(2))
                    self.state[p] = dict(zip(("step", "exp_avg", "exp_avg_sq"), (new, *moments), strict=True))
            states = [self.state[p] for p in group["params"]]
            columns = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
            self._lists.append(_Lists(group, list(group["params"]), *columns))

    def _separate_counters(self) -> None:
        """Give every parameter a counter of its own, because not all are updated in this step."""
        every = [counter for lists in self._lists for counter in lists.counters]
        if len({id(counter) for counter in every}) == len(every):
            return
        for lists in self._lists:
            lists.counters = [counter.clone() for counter in lists.counters]
            for p, counter in zip(lists.parameters, lists.counters, strict=True):
                self.state[p]["step"] = counter


def _with_gradient(lists: _Lists, gradients: list[Tensor | None]) -> tuple[_Lists, list[Tensor]]:
    """Return the lists of the parameters that have a gradient, and these gradients."""
    known = [gradient for gradient in gradients if gradient is not None]
    if len(known) == len(gradients):
        return lists, known
    rows = [i for i, gradient in enumerate(gradients) if gradient is not None]
    columns = (lists.parameters, lists.averages, lists.squares, lists.counters)
    return _Lists(lists.group, *([column[i] for i in rows] for column in columns)), known
