"""One query per sentence and head on a CPU: sentences of one length form a batch of matrix products, without padding.

Adjacent sentences of equal length are one batch of views; a caller that sorts its sentences by length therefore copies nothing.
Otherwise sentences are sorted first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comtip_kernels.gene_sentence_embedding.plan import sentence_start
from comtip_kernels.packed_attention.cpu import FEW


def _runs(length_N: Tensor) -> list[tuple[int, int]]:
    """Return (number of sentences, tokens per sentence) of each run of equal lengths."""
    lengths, counts = torch.unique_consecutive(length_N, return_counts=True)
    return list(zip(counts.tolist(), lengths.tolist(), strict=True))


# Shapes depend on the lengths: torch.compile would recompile for every batch, up to its limit.
@torch.compiler.disable
def one_query_attention_cpu(query_NHD: Tensor, x_SD: Tensor, length_M: Tensor, longest: int, scale: float) -> Tensor:
    """Return (N, H, D); see :mod:`comtip_kernels.one_query_attention.reference`."""
    (N, _, D), dtype = query_NHD.shape, torch.promote_types(query_NHD.dtype, x_SD.dtype)
    query_NHD, x_SD, length_N = query_NHD.to(dtype), x_SD.to(dtype), length_M[:N]
    runs = _runs(length_N)
    if len(runs) * FEW > x_SD.shape[0] and len(runs) > len({length for _, length in runs}):
        order_N = torch.argsort(length_N, stable=True)
        sorted_N = length_N[order_N]
        shift_N = sentence_start(length_N)[order_N] - sentence_start(sorted_N)
        token_S = torch.arange(int(sorted_N.sum())) + torch.repeat_interleave(shift_N, sorted_N)
        out_NHD = one_query_attention_cpu(query_NHD[order_N], x_SD[token_S], sorted_N, longest, scale)
        return out_NHD[torch.argsort(order_N)]
    sizes = [n * length for n, length in runs]
    parts = x_SD.split([*sizes, x_SD.shape[0] - sum(sizes)])
    out = []
    for (n, length), query, tokens in zip(runs, query_NHD.split([n for n, _ in runs]), parts, strict=False):
        x = tokens.view(n, length, D)
        weight = (query @ x.mT * scale).softmax(-1)
        out.append(weight @ x)
    # Without sentences, the result still has the operands' graph.
    return torch.cat(out) if out else query_NHD + x_SD.sum()
