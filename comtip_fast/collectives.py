"""Process-group interface passed to the model and the losses.

This module does not import ``torch.distributed``; :mod:`comtip_fast.training.distributed.process_group` implements the
interface with it. :class:`SingleProcessGroup` implements it for one process, so that losses need no special case.

Rows, of the global batch or of the sentence table, are split over ranks into contiguous slices of nearly equal size
(:func:`share_of`). Convention for losses: each rank returns its share of the global loss, the shares sum to the global
loss, and gradients are summed over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Group(Protocol):
    """A group of processes and its collectives, none of which is differentiable."""

    @property
    def rank(self) -> int:
        """Rank of this process, 0 to ``size`` - 1."""
        ...

    @property
    def size(self) -> int:
        """Number of processes, W."""
        ...

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """All-gather: return the rows of all ranks in rank order; ``counts`` has each rank's number of rows."""
        ...

    def scatter_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Reduce-scatter: return this rank's slice of the rows, summed over ranks; the transpose of :meth:`gather_rows`."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce: return the elementwise sum over ranks."""
        ...

    def max(self, values: Tensor) -> Tensor:
        """All-reduce: return the elementwise maximum over ranks."""
        ...

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Return, for each flag, whether any rank set it; flags are exchanged in host memory, without a device synchronization."""
        ...

    def ring_shift(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Callable[[], None]:
        """Start sending to the next rank and receiving from the previous one; the returned function waits for both."""
        ...


class SingleProcessGroup:
    """A group of one process; its collectives return their input."""

    rank = 0
    size = 1

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return ``rows``."""
        return rows

    def scatter_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return ``rows``."""
        return rows

    def sum(self, values: Tensor) -> Tensor:
        """Return ``values``."""
        return values

    def max(self, values: Tensor) -> Tensor:
        """Return ``values``."""
        return values

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Return ``flags`` as a list."""
        return list(flags)

    def ring_shift(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Callable[[], None]:
        """Copy ``send`` to ``receive``; the returned function does nothing."""
        for source, target in zip(send, receive, strict=True):
            target.copy_(source)
        return lambda: None


def counts_of(n: int, size: int) -> list[int]:
    """Return how many of ``n`` rows each of ``size`` ranks has; counts differ by at most one, the larger counts come first."""
    return [n // size + (rank < n % size) for rank in range(size)]


def share_of(n: int, rank: int, size: int) -> slice:
    """Return the slice of ``n`` rows that belongs to rank ``rank`` of ``size`` ranks."""
    counts = counts_of(n, size)
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


class _GatherRows(torch.autograd.Function):
    """All-gather of rows whose backward pass is the reduce-scatter of the gradients, at least in fp32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, counts: Sequence[int]) -> Tensor:
        ctx.group, ctx.counts = group, counts
        return group.gather_rows(rows.contiguous(), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        # NCCL stores partial sums in the dtype that it transfers: in bf16, their error would grow with the number of ranks.
        total = ctx.group.scatter_rows(grad.to(torch.promote_types(grad.dtype, torch.float32)), ctx.counts)
        return total.to(grad.dtype), None, None


def gather_rows(rows: Tensor, group: Group, counts: Sequence[int]) -> Tensor:
    """All-gather rows, differentiably: the backward pass sums gradients over ranks in fp32 and scatters them (reduce-scatter)."""
    return rows if group.size == 1 else _GatherRows.apply(rows, group, counts)
