"""Attention inside many short sentences on a CPU: sentences of one length together, nothing padded, nothing masked.

A padded batch pays for its longest sentence N times over. Here the sentences of each length L are gathered, attended as
(N_L, H) little matrices of L x L, and put back. The weights are made again in the backward, so that none is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from comtip_kernels.cpu_common import softmax_
from comtip_kernels.gene_sentence_embedding.plan import sentence_start


def _buckets(length_N: Tensor) -> Iterator[Tensor]:
    """Yield the tokens (N_L, L) of the sentences of one length, for every length."""
    start_N = sentence_start(length_N)
    order = torch.argsort(length_N, stable=True)
    lengths, counts = torch.unique_consecutive(length_N[order], return_counts=True)
    for length, own in zip(lengths.tolist(), order.split(counts.tolist()), strict=True):
        if length > 0:
            yield start_N[own, None] + torch.arange(length)


def _gather(x_SHE: Tensor, token_NL: Tensor) -> Tensor:
    """Return (N_L * H, L, E)."""
    N, L = token_NL.shape
    H, E = x_SHE.shape[1:]
    return x_SHE.index_select(0, token_NL.flatten()).view(N, L, H, E).transpose(1, 2).reshape(N * H, L, E)


def _put(out_SHE: Tensor, token_NL: Tensor, part: Tensor) -> None:
    """Write (N_L * H, L, E) back to the tokens it is of."""
    N, L = token_NL.shape
    H, E = out_SHE.shape[1:]
    out_SHE.index_copy_(0, token_NL.flatten(), part.view(N, H, L, E).transpose(1, 2).reshape(N * L, H, E))


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return softmax_(torch.bmm(q, k.transpose(1, 2)))


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, length)
        out = torch.empty(q.shape, dtype=q.dtype)
        scale = q.shape[-1] ** -0.5
        for tokens in _buckets(length):
            a, b, c = (_gather(x, tokens) for x in (q, k, v))
            _put(out, tokens, torch.bmm(_weights(a.mul_(scale), b), c))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, length = ctx.saved_tensors
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        for tokens in _buckets(length):
            a, b, c, g = (_gather(x, tokens) for x in (q, k, v, grads[0]))
            p = _weights(a.mul_(scale), b)
            _put(dv, tokens, torch.bmm(p.transpose(1, 2), g))
            dp = torch.bmm(g, c.transpose(1, 2))
            # d softmax: p (dp - <dp, p>), row by row.
            ds = dp.sub_((dp * p).sum(-1, keepdim=True)).mul_(p)
            _put(dk, tokens, torch.bmm(ds.transpose(1, 2), a))
            _put(dq, tokens, torch.bmm(ds, b).mul_(scale))
        return dq, dk, dv, None


def packed_attention_cpu(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return (S, H, E); see :mod:`comtip_kernels.packed_attention.reference`."""
    return _PackedAttention.apply(q_SHE, k_SHE, v_SHE, length_N)
