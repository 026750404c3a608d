"""Seconds of each part of a training step, the backward pass included."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from comtip_fast.runtime.torch_internals import tree_map

PARTS = (
    "loader",
    "vision both",
    "vision full",
    "vision masked",
    "table",
    "pooling",
    "mispairing",
    "InfoNCE",
    "level",
    "pair",
    "optimizer",
    "communication",
)
OTHER = "other"


class PartClock:
    """Attributes the time of a step to its parts.

    The forward pass enters a part as a context. Results of a part are marked: the gradient of a mark arrives when the backward
    pass of its part begins, and the part then runs until the next mark. While the clock is not ``running``, parts and marks do
    nothing.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.running, self._read = device, False, now
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._part, self._began = OTHER, 0.0

    def start(self) -> None:
        """Start timing one or several steps."""
        self.running, self._part, self._began = True, OTHER, self._now()

    def stop(self) -> None:
        """Stop timing."""
        self.switch(OTHER)
        self.running = False

    def end_backward(self) -> None:
        """Leave the part in which the backward pass ended; the time until the next part counts as :data:`OTHER`."""
        if self.running:
            self.switch(OTHER)

    def switch(self, part: str) -> None:
        """Attribute the time until the next switch to ``part``."""
        now = self._now()
        self.seconds[self._part] += now - self._began
        self._part, self._began = part, now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Attribute the time of the ``with`` block to a part; blocks can be nested."""
        if not self.running:
            yield
            return
        before = self._part
        self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def wrap(self, function: Callable[..., Any], name: Callable[..., str] | str) -> Callable[..., Any]:
        """Return a function that runs ``function`` as a part and marks its results; ``name`` may be computed from the arguments."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.running:
                return function(*args, **kwargs)
            own = name if isinstance(name, str) else name(*args, **kwargs)
            with self.part(own):
                out = function(*args, **kwargs)
            return tree_map(lambda x: self._marked(x, own), out)

        return call

    def _marked(self, x: Any, name: str) -> Any:
        return _Mark.apply(x, self, name) if isinstance(x, Tensor) and x.requires_grad else x

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._read()


class _Mark(torch.autograd.Function):
    """The identity; its backward pass switches the clock."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: PartClock, name: str) -> Tensor:
        ctx.clock, ctx.name = clock, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None, None]:
        if ctx.clock.running:
            ctx.clock.switch(ctx.name)
        return grads[0], None, None


@contextmanager
def wrapped(clock: PartClock, owner: Any, attribute: str, name: Callable[..., str] | str) -> Iterator[None]:
    """Replace a function of a module or a method of an object by its timed form inside the block."""
    own = vars(owner).get(attribute)
    setattr(owner, attribute, clock.wrap(getattr(owner, attribute), name))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, own)
