"""Attention that never leaves its sentence, as padded scaled-dot-product attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_attention_reference(q_NTHE: Tensor, k_NTHE: Tensor, v_NTHE: Tensor, length_N: Tensor) -> Tensor:
    """Return (N, T, H, E): softmax(q k^T / sqrt(E)) v over the first ``length`` tokens of each sentence.

    Rows past a sentence's end are finite but meaningless.
    """
    T = q_NTHE.shape[1]
    keep_NT = torch.arange(T, device=length_N.device) < length_N[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q_NTHE, k_NTHE, v_NTHE))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep_NT[:, None, None, :])
    return out.transpose(1, 2)
