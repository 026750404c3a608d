"""What the model and the losses know of other processes: a group with a handful of collectives, handed to them.

Nothing here imports ``torch.distributed``; :mod:`comtip_fast.training.distributed.process_group` has the group that does. One process
is :class:`SingleProcessGroup`, whose collectives return what they are given, so a loss is written once.

Rows are shared out in contiguous, nearly equal slices (:func:`share_of`): the global batch and the genes of the sentence
table alike. Convention for losses: each rank returns *its share* of the global loss, the shares add up to it, and
gradients are summed over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Group(Protocol):
    """The processes that train together."""

    @property
    def rank(self) -> int:
        """Number of this process, 0 to ``size`` - 1."""
        ...

    @property
    def size(self) -> int:
        """W, how many there are."""
        ...

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return every rank's rows, rank after rank; ``counts`` says how many each has. No gradient."""
        ...

    def scatter_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the sum over ranks of this rank's part of the rows: the reverse of :meth:`gather_rows`. No gradient."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks. No gradient."""
        ...

    def max(self, values: Tensor) -> Tensor:
        """Return the maximum over ranks. No gradient."""
        ...

    def ring_shift(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Callable[[], None]:
        """Start sending to the next rank and receiving from the one before; the call that is returned waits."""
        ...


class SingleProcessGroup:
    """A group of one."""

    rank = 0
    size = 1

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows."""
        return rows

    def scatter_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows."""
        return rows

    def sum(self, values: Tensor) -> Tensor:
        """Return the values."""
        return values

    def max(self, values: Tensor) -> Tensor:
        """Return the values."""
        return values

    def ring_shift(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Callable[[], None]:
        """Hand what is sent straight to who receives: oneself."""
        for source, target in zip(send, receive, strict=True):
            target.copy_(source)
        return lambda: None


def counts_of(n: int, size: int) -> list[int]:
    """Return how many of ``n`` rows each of ``size`` ranks has; they differ by at most one, the first have more."""
    return [n // size + (rank < n % size) for rank in range(size)]


def share_of(n: int, rank: int, size: int) -> slice:
    """Return which of ``n`` rows are this rank's."""
    counts = counts_of(n, size)
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, counts: Sequence[int]) -> Tensor:
        ctx.group, ctx.counts = group, counts
        return group.gather_rows(rows.contiguous(), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.scatter_rows(grads[0].contiguous(), ctx.counts), None, None


def gather_rows(rows: Tensor, group: Group, counts: Sequence[int]) -> Tensor:
    """All-gather rows with a gradient: each row's is summed over all ranks and goes back to where it came from."""
    return rows if group.size == 1 else _GatherRows.apply(rows, group, counts)
