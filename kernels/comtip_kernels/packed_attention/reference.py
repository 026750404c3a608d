"""Attention within each sentence as padded scaled-dot-product attention: the definition of the operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_attention_reference(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return softmax(q k^T / sqrt(E)) v within each sentence, (S, H, E).

    Sentences are padded to the longest and unpadded afterwards. Operands of several dtypes are promoted to the widest.
    """
    dtype = torch.promote_types(torch.promote_types(q_SHE.dtype, k_SHE.dtype), v_SHE.dtype)
    keep_NT = torch.arange(longest, device=length_N.device) < length_N[:, None]
    sentence_S, slot_S = keep_NT.nonzero(as_tuple=True)
    shape = (length_N.shape[0], longest, *q_SHE.shape[1:])
    q, k, v = (
        x.new_zeros(shape, dtype=dtype).index_put((sentence_S, slot_S), x.to(dtype)).transpose(1, 2)
        for x in (q_SHE, k_SHE, v_SHE)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep_NT[:, None, None, :])
    return out.transpose(1, 2)[sentence_S, slot_S]


def with_bias(qkv_N3HE: Tensor, bias_C: Tensor | None) -> Tensor:
    """Return q, k and v (N, 3, H, E) plus their bias (3 H E), in their dtype."""
    if bias_C is None:
        return qkv_N3HE
    return (qkv_N3HE + bias_C.view(qkv_N3HE.shape[1:])).to(qkv_N3HE.dtype)


def image_attention_reference(qkv_N3HE: Tensor, tokens: Sequence[int], bias_C: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(E)) v within each image, (N, H, E): one call of PyTorch's attention per part."""
    N, _, H, E = qkv_N3HE.shape
    qkv_N3HE = with_bias(qkv_N3HE, bias_C)
    images = N // sum(tokens)
    parts = []
    for part, T in zip(qkv_N3HE.split([images * T for T in tokens]), tokens, strict=True):
        q, k, v = (x.transpose(1, 2) for x in part.view(images, T, 3, H, E).unbind(2))
        parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(images * T, H, E))
    return torch.cat(parts)
