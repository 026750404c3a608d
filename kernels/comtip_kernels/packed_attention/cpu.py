"""Attention inside many short sentences on a CPU: sentences of one length together, nothing padded.

A padded batch pays for its longest sentence N times over. Here neighbouring sentences of one length are attended as one batch,
as views of what came in: nothing is moved. Where neighbours differ in length, tokens are laid out by length first and the result
is laid back; a caller that sorts its sentences once spares that in every layer.

Vector registers hold 16 scores, and torch's attention takes rows that are shorter number by number. So several short sentences
share a matrix, with a mask between them. A NaN or an infinity would pass the mask (0 times NaN is NaN): where the result shows
one, it is made again, one sentence to a matrix. Only a NaN in the gradient from above still reaches the sentences of its matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comtip_kernels.gene_sentence_embedding.plan import sentence_start

VECTOR = 16
"""Scores that a row must have before torch takes several at once."""
FEW = 64
"""Tokens of a batch below which laying all tokens out by length costs less than the calls for so many small batches."""
Batch = tuple[int, int, int]
"""So many matrices, sentences in each, tokens of each sentence."""


class _Reorder(torch.autograd.Function):
    """x[order], for an order that names every token once: its backward is a copy too, and repeats to the bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order, back = ctx.saved_tensors
        return _Reorder.apply(grads[0], back, order), None, None


def _runs(length_N: Tensor) -> list[Batch]:
    """Return neighbours of one length, one sentence to a matrix; those of no token left out."""
    lengths, counts = torch.unique_consecutive(length_N[length_N > 0], return_counts=True)
    return [(n, 1, length) for n, length in zip(counts.tolist(), lengths.tolist(), strict=True)]


def _shared(runs: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the same with as many sentences to a matrix as fill a vector register, what is left over by itself."""
    for n, _, length in runs:
        several = -(-VECTOR // length)
        if n >= several:
            yield n // several, several, length
        if n % several:
            yield 1, n % several, length


def _by_length(length_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lengths sorted, the tokens in that order, and the way back."""
    sorted_N, order_N = torch.sort(length_N, stable=True)
    shift_N = sentence_start(length_N)[order_N] - sentence_start(sorted_N)
    token_S = torch.arange(int(length_N.sum()))
    order_S = token_S + torch.repeat_interleave(shift_N, sorted_N)
    return sorted_N, order_S, torch.empty_like(order_S).scatter_(0, order_S, token_S)


def _between(several: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """Return what keeps the sentences of a matrix apart, to be added to its scores; None for one sentence."""
    if several == 1:
        return None
    own = torch.arange(several).repeat_interleave(length)
    return torch.zeros(own.shape[0], own.shape[0], dtype=dtype).masked_fill_(own[:, None] != own, float("-inf"))


def _attend(qkv: tuple[Tensor, ...], batches: list[Batch]) -> Tensor:
    """Attend within sentences of which equally long ones lie together; ``qkv`` is (q, k, v), or one (S, 3, H, E)."""
    sizes = [n * several * length for n, several, length in batches]
    out = []
    for (n, several, length), *parts in zip(batches, *(x.split(sizes) for x in qkv), strict=True):
        parts = list(parts[0].unbind(1)) if len(parts) == 1 else parts
        q, k, v = (x.unflatten(0, (n, several * length)).transpose(1, 2) for x in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=_between(several, length, q.dtype))
        out.append(mixed.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


# Shapes follow the lengths: torch.compile would compile anew with every batch, until its limit is reached.
@torch.compiler.disable
def _packed(qkv: tuple[Tensor, ...], length_N: Tensor) -> Tensor:
    """Return (S, H, E)."""
    S, runs = qkv[0].shape[0], _runs(length_N)
    if S == 0:
        return qkv[0].sum(1) if len(qkv) == 1 else qkv[0] + qkv[1] + qkv[2]
    if len(runs) * FEW > S and len(runs) > len({length for _, _, length in runs}):
        sorted_N, order_S, back_S = _by_length(length_N)
        return _Reorder.apply(
            _packed(tuple(_Reorder.apply(x, order_S, back_S) for x in qkv), sorted_N), back_S, order_S
        )
    shared = list(_shared(runs))
    out = _attend(qkv, shared)
    wide = torch.promote_types(out.dtype, torch.float32)
    clean = shared == runs or bool(torch.isfinite(out.detach().sum(dtype=wide)))
    return out if clean else _attend(qkv, runs)


def packed_attention_cpu(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return (S, H, E); see :mod:`comtip_kernels.packed_attention.reference`."""
    return _packed((q_SHE, k_SHE, v_SHE), length_N)


def packed_attention_qkv_cpu(qkv_S3HE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return (S, H, E) of one projection: its gradient is put together batch by batch, in the cache, not by one pass of its own."""
    return _packed((qkv_S3HE,), length_N)
