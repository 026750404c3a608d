"""Attention inside many short sentences on a CPU: sentences of one length together, nothing padded, nothing masked.

A padded batch pays for its longest sentence N times over. Here the sentences of each length L are gathered, attended as
(N_L, H) little matrices of L x L, and put back. The weights are made again in the backward, so that none is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from comtip_kernels.packed_attention.reference import packed_attention_reference

FULL_ENOUGH = 0.6
"""Share of the padded batch that is tokens, from which padding costs less than gathering (measured, docs/kernels.md)."""


def _buckets(length_N: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (length, sentences of that length, ascending)."""
    order = torch.argsort(length_N, stable=True)
    lengths, counts = torch.unique_consecutive(length_N[order], return_counts=True)
    start = 0
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        yield length, order[start : start + count]
        start += count


def _gather(x_NTHE: Tensor, rows: Tensor, length: int) -> Tensor:
    """Return (N_L * H, L, E)."""
    part = x_NTHE[:, :length].index_select(0, rows)
    return part.transpose(1, 2).reshape(-1, length, x_NTHE.shape[-1])


def _put(out_NTHE: Tensor, rows: Tensor, part: Tensor) -> None:
    """Write (N_L * H, L, E) back to the sentences it is of."""
    H, E = out_NTHE.shape[2:]
    length = part.shape[1]
    out_NTHE[:, :length].index_copy_(0, rows, part.view(-1, H, length, E).transpose(1, 2))


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(q, k.transpose(1, 2)).softmax(-1)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, length)
        out = torch.zeros(q.shape, dtype=q.dtype)
        scale = q.shape[-1] ** -0.5
        for L, rows in _buckets(length):
            a, b, c = (_gather(x, rows, L) for x in (q, k, v))
            _put(out, rows, torch.bmm(_weights(a.mul_(scale), b), c))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, length = ctx.saved_tensors
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        for L, rows in _buckets(length):
            a, b, c, g = (_gather(x, rows, L) for x in (q, k, v, grads[0]))
            p = _weights(a.mul_(scale), b)
            _put(dv, rows, torch.bmm(p.transpose(1, 2), g))
            dp = torch.bmm(g, c.transpose(1, 2))
            # d softmax: p (dp - <dp, p>), row by row.
            ds = dp.sub_((dp * p).sum(-1, keepdim=True)).mul_(p)
            _put(dk, rows, torch.bmm(ds.transpose(1, 2), a))
            _put(dq, rows, torch.bmm(ds, b).mul_(scale))
        return dq, dk, dv, None


def packed_attention_cpu(q_NTHE: Tensor, k_NTHE: Tensor, v_NTHE: Tensor, length_N: Tensor) -> Tensor:
    """Return (N, T, H, E); see :mod:`comtip_kernels.packed_attention.reference`."""
    tokens = q_NTHE.shape[0] * q_NTHE.shape[1]
    if tokens and int(length_N.sum()) >= FULL_ENOUGH * tokens:
        return packed_attention_reference(q_NTHE, k_NTHE, v_NTHE, length_N)
    return _PackedAttention.apply(q_NTHE, k_NTHE, v_NTHE, length_N)
