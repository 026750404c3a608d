"""Attention with one query per sentence and head as padded matrix products: the definition of the operation."""

from __future__ import annotations

import torch
from torch import Tensor


def one_query_attention_reference(
    query_NHD: Tensor, x_SD: Tensor, length_M: Tensor, longest: int, scale: float
) -> Tensor:
    """Return the weighted means of each sentence's tokens, (N, H, D).

    Sentences are padded to the longest. Operands of two dtypes are promoted to the wider one. A sentence without tokens has
    a result of 0.
    """
    dtype = torch.promote_types(query_NHD.dtype, x_SD.dtype)
    N = query_NHD.shape[0]
    keep_NT = torch.arange(longest, device=length_M.device) < length_M[:N, None]
    sentence_S, slot_S = keep_NT.nonzero(as_tuple=True)
    padded_NTD = x_SD.new_zeros(N, longest, x_SD.shape[1], dtype=dtype)
    padded_NTD = padded_NTD.index_put((sentence_S, slot_S), x_SD[: sentence_S.shape[0]].to(dtype))
    score_NHT = (query_NHD.to(dtype) @ padded_NTD.mT * scale).masked_fill(~keep_NT[:, None], float("-inf"))
    empty_N11 = (length_M[:N] == 0)[:, None, None]
    weight_NHT = score_NHT.masked_fill(empty_N11, 0.0).softmax(-1)
    return weight_NHT @ padded_NTD
