"""Timing of collectives in the losses, the sentence table, DDP and ZeRO.

On CPUs the clock measures the time for which a collective blocks the step. On GPUs it measures collectives with CUDA
events on their stream, without synchronization. For losses, table and DDP this is the time for which the step waits. ZeRO
runs collectives on its own streams, so their full duration counts even if it overlaps with computation.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from comtip_fast.collectives import Group
from comtip_fast.runtime.torch_internals import call_after_backward

COLLECTIVES = (
    "broadcast",
    "reduce",
    "all_reduce",
    "all_reduce_coalesced",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "all_to_all",
    "all_to_all_single",
)
"""Methods of DeepSpeed's communication backend that ZeRO may call in a step."""


class CommClock:
    """Accumulates time spent in communication.

    Parameters
    ----------
    device
        Device of the run; time on GPUs is measured with events.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds, self._kept_seconds, self._depth = 0.0, 0.0, 0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._kept_pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block; nested blocks count once."""
        self._depth += 1
        began = self._now() if self._depth == 1 else None
        try:
            yield
        finally:
            self._depth -= 1
            if began is not None:
                self._count(began)

    @contextmanager
    def after_backward(self, loss: Tensor) -> Iterator[None]:
        """Count the time for which the backward pass from ``loss``, run inside the block, waits for DDP at its end.

        PyTorch runs callbacks at the end of a backward pass in the order in which they were queued. DDP queues its wait
        with its last bucket, after this callback, which is queued with the first gradient.
        """
        began: list[Any] = []

        def queue(_gradient: Tensor) -> None:
            call_after_backward(lambda: began.append(self._now()))

        handle = loss.register_hook(queue)
        yield
        handle.remove()
        if began:
            self._count(began[-1])

    def clocked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a wrapper of ``call`` that counts the time of the call and of waiting for the work that the call returns."""

        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                work = call(*args, **kwargs)
            return _ClockedWork(work, self) if hasattr(work, "wait") else work

        return counted

    def discard(self) -> None:
        """Discard the time measured since the last :meth:`keep`, such as the time of collectives between steps."""
        self._seconds, self._pairs = 0.0, []

    def keep(self) -> None:
        """Count the time measured since the last :meth:`keep` or :meth:`discard`, without a device synchronization."""
        self._kept_seconds += self._seconds
        self._kept_pairs += self._pairs
        self.discard()

    def seconds(self) -> float:
        """Return the communication time since the last call in seconds; on GPUs this waits for the last collective."""
        self.keep()
        for first, last in self._kept_pairs:
            last.synchronize()
            self._kept_seconds += first.elapsed_time(last) / 1e3
        out, self._kept_seconds, self._kept_pairs = self._kept_seconds, 0.0, []
        return out

    def _now(self) -> Any:
        """Return the current time in seconds, or a recorded CUDA event."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _count(self, began: Any) -> None:
        """Count the time since ``began``, a result of :meth:`_now`."""
        if self._cuda:
            self._pairs.append((began, self._now()))
        else:
            self._seconds += time.perf_counter() - began


class _ClockedWork:
    """A running collective whose waiting time is counted."""

    def __init__(self, work: Any, clock: CommClock) -> None:
        self._work, self._clock = work, clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.running():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class ClockedGroup:
    """A group that counts the time of its collectives; engines count theirs with the same ``clock``."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.inner, self.rank, self.size = group, group.rank, group.size
        self.clock = CommClock(device)

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """See :class:`Group`."""
        with self.clock.running():
            return self.inner.gather_rows(rows, counts)

    def scatter_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """See :class:`Group`."""
        with self.clock.running():
            return self.inner.scatter_rows(rows, counts)

    def sum(self, values: Tensor) -> Tensor:
        """See :class:`Group`."""
        with self.clock.running():
            return self.inner.sum(values)

    def max(self, values: Tensor) -> Tensor:
        """See :class:`Group`."""
        with self.clock.running():
            return self.inner.max(values)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """See :class:`Group`; time on the hosts is not counted."""
        return self.inner.any(flags)

    def ring_shift(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Callable[[], None]:
        """See :class:`Group`; only the wait counts, because the transfer overlaps with computation."""
        wait = self.inner.ring_shift(send, receive)

        def clocked_wait() -> None:
            with self.clock.running():
                wait()

        return clocked_wait


def clock_of(group: Group, device: torch.device) -> CommClock:
    """Return the group's clock, or a new one if the group has none."""
    return group.clock if isinstance(group, ClockedGroup) else CommClock(device)


def clock_backend(backend: Any, clock: CommClock) -> None:
    """Count the time of the collectives of DeepSpeed's communication backend; replaces the clock of an earlier call."""
    for name in COLLECTIVES:
        plain = getattr(backend, name, None)
        plain = getattr(plain, "comtip_plain", plain)
        if plain is not None:
            counted: Any = clock.clocked(plain)
            counted.comtip_plain = plain
            setattr(backend, name, counted)
