"""Attention within many short sentences on a CPU: sentences of one length form a batch, without padding.

Adjacent sentences of equal length are attended as one batch of views, without copying. If such runs are short and
lengths are unsorted, tokens are first reordered by length and the result is reordered back; callers that sort their sentences
once avoid this in every layer.

A vector register holds 16 scores, and torch's attention processes shorter rows element by element. Several short sentences
therefore share a matrix, with a mask between them. NaN and infinity pass the mask (0 times NaN is NaN): if the result
contains one, it is recomputed with one sentence per matrix. A NaN in the incoming gradient still reaches the sentences of its
matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from comtip_kernels.gene_sentence_embedding.plan import sentence_start

VECTOR = 16
"""Minimum scores per row for torch to vectorise."""
FEW = 64
"""Tokens per batch below which reordering all tokens by length costs less than the calls for so many small batches."""
Batch = tuple[int, int, int]
"""Number of matrices, sentences per matrix, tokens per sentence."""


class _Reorder(torch.autograd.Function):
    """x[order] for a permutation ``order``: the backward pass is a copy too, and deterministic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(grads[0], inverse, order), None, None


def _runs(length_N: Tensor) -> list[Batch]:
    """Return runs of equal length with one sentence per matrix; sentences without tokens are omitted."""
    length = length_N.numpy()  # for the few hundred lengths of a panel, NumPy needs a quarter of the time of torch
    length = length[length > 0]
    start = np.flatnonzero(np.diff(length, prepend=0))
    counts = np.diff(start, append=length.size)
    return [(n, 1, each) for n, each in zip(counts.tolist(), length[start].tolist(), strict=True)]


def _shared(runs: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the runs with as many sentences per matrix as fill a vector register; the remainder of a run forms one matrix.

    A run of fewer than two such matrices is one matrix: another call takes longer than the products between its sentences.
    """
    for n, _, length in runs:
        several = -(-VECTOR // length)
        if several < n < 2 * several:
            several = n
        if n >= several:
            yield n // several, several, length
        if n % several:
            yield 1, n % several, length


def _by_length(length_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sorted lengths, the permutation of the tokens and its inverse."""
    sorted_N, order_N = torch.sort(length_N, stable=True)
    shift_N = sentence_start(length_N)[order_N] - sentence_start(sorted_N)
    token_S = torch.arange(int(length_N.sum()))
    order_S = token_S + torch.repeat_interleave(shift_N, sorted_N)
    return sorted_N, order_S, torch.empty_like(order_S).scatter_(0, order_S, token_S)


@lru_cache(maxsize=64)
def _separator(several: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """Return the additive mask between the sentences of a matrix, of at most 45 x 45 values; None for one sentence."""
    if several == 1:
        return None
    with torch.inference_mode(False):  # training, too, uses the cached mask of a prediction
        own = torch.arange(several, device="cpu").repeat_interleave(length)
        mask = torch.zeros(own.shape[0], own.shape[0], dtype=dtype, device="cpu")
        return mask.masked_fill_(own[:, None] != own, float("-inf"))


def _attend(qkv: tuple[Tensor, ...], batches: list[Batch]) -> Tensor:
    """Attend within sentences that are grouped by length; ``qkv`` is (q, k, v), or one tensor (S, 3, H, E)."""
    sizes = [n * several * length for n, several, length in batches]
    out = []
    for (n, several, length), *parts in zip(batches, *(x.split(sizes) for x in qkv), strict=True):
        shape = (n, several * length)
        if len(parts) == 1:
            matrices = parts[0].view(*shape, *parts[0].shape[1:]).unbind(2)
        else:
            matrices = tuple(x.unflatten(0, shape) for x in parts)
        q, k, v = (x.transpose(1, 2) for x in matrices)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=_separator(several, length, q.dtype))
        out.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


# Shapes depend on the lengths: torch.compile would recompile for every batch, up to its limit.
@torch.compiler.disable
def _packed(qkv: tuple[Tensor, ...], length_N: Tensor) -> Tensor:
    """Return the attended values (S, H, E); tokens are reordered by length first if there are many short runs."""
    S, runs = qkv[0].shape[0], _runs(length_N)
    if S == 0:
        return qkv[0].sum(1) if len(qkv) == 1 else qkv[0] + qkv[1] + qkv[2]
    if len(runs) * FEW > S and len(runs) > len({length for _, _, length in runs}):
        sorted_N, order_S, inverse_S = _by_length(length_N)
        reordered = tuple(_Reorder.apply(x, order_S, inverse_S) for x in qkv)
        return _Reorder.apply(_packed(reordered, sorted_N), inverse_S, order_S)
    shared = list(_shared(runs))
    out = _attend(qkv, shared)
    wide = torch.promote_types(out.dtype, torch.float32)
    finite = shared == runs or math.isfinite(out.detach().sum(dtype=wide).item())
    return out if finite else _attend(qkv, runs)


def packed_attention_cpu(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return (S, H, E); see :mod:`comtip_kernels.packed_attention.reference`."""
    dtype = torch.promote_types(torch.promote_types(q_SHE.dtype, k_SHE.dtype), v_SHE.dtype)
    return _packed((q_SHE.to(dtype), k_SHE.to(dtype), v_SHE.to(dtype)), length_N)


def packed_attention_qkv_cpu(qkv_S3HE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return (S, H, E) for q, k, v stored together; their gradient is written batch by batch, to stay in the CPU cache."""
    return _packed((qkv_S3HE,), length_N)
