"""Embedding of gene sentences, the definition of the operation: token, type and position rows summed, then LayerNorm.

A sentence is ``[GENE] name tokens ... [VALUE]``; its tokens occupy slots 0..length-1, the last of which is the value slot.
The row of the value slot is that of the level, or a mixture of two rows for a value between two levels.

    x[n, t] = token[ids[n, t]] + type[kind(t)] + position[t]       t < length_n - 1
    x[n, 0]   also + identity[own_n] if own_n > 0
    x[n, t] = (1 - w_n) level[lo_n] + w_n level[hi_n] + type[VALUE] + position[t]      t = length_n - 1
    y       = gain (x - mean) / sqrt(var + eps) + bias             where a gain is given
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from comtip_kernels.gene_sentence_embedding.plan import GENE_SLOT, NAME_SLOT, VALUE_SLOT, SentencePlan


def gene_sentence_embedding_reference(
    ids_NT: Tensor,
    length_N: Tensor,
    level_lo_N: Tensor,
    token_VD: Tensor,
    type_3D: Tensor,
    position_TD: Tensor,
    level_QD: Tensor,
    *,
    level_hi_N: Tensor | None = None,
    mix_N: Tensor | None = None,
    identity_N: Tensor | None = None,
    identity_ID: Tensor | None = None,
    gain_D: Tensor | None = None,
    bias_D: Tensor | None = None,
    eps: float = 1e-5,
    plan: SentencePlan | None = None,
    distinct: bool = False,
) -> Tensor:
    """Return the embedded tokens y (S, D): the S tokens of all sentences, one sentence after another.

    The formula is in the docstring of this module, and the parameters are those of
    :func:`comtip_kernels.gene_sentence_embedding.gene_sentence_embedding`. ``plan`` is used with ``distinct`` only.
    """
    T = ids_NT.shape[1]
    slot_T = torch.arange(T, device=ids_NT.device)
    value_NT = slot_T == length_N[:, None] - 1
    inside_NT = slot_T < length_N[:, None]
    kind_NT = torch.where(value_NT, VALUE_SLOT, torch.where(slot_T == 0, GENE_SLOT, NAME_SLOT))
    level_ND = F.embedding(level_lo_N.long(), level_QD)
    if level_hi_N is not None and mix_N is not None:
        mix = mix_N[:, None].to(level_ND.dtype)
        level_ND = (1 - mix) * level_ND + mix * F.embedding(level_hi_N.long(), level_QD)
    word_NTD = F.embedding(ids_NT.masked_fill(~inside_NT, 0).long(), token_VD)
    if identity_N is not None and identity_ID is not None:
        own_ND = F.embedding(identity_N.long(), identity_ID) * (identity_N > 0).to(identity_ID.dtype)[:, None]
        word_NTD = word_NTD + own_ND[:, None] * (slot_T == 0).to(own_ND.dtype)[None, :, None]
    word_NTD = torch.where(value_NT[..., None], level_ND[:, None, :], word_NTD)
    x_SD = (word_NTD + F.embedding(kind_NT, type_3D) + position_TD[:T])[inside_NT]
    y_SD = x_SD if gain_D is None else F.layer_norm(x_SD, x_SD.shape[-1:], gain_D, bias_D, eps)
    if not distinct or plan is None:
        return y_SD
    # Any token of a row will do; a row that no token has is not read.
    return y_SD[plan.order_S[plan.start_U1[:-1].clamp_max(max(y_SD.shape[0] - 1, 0))]]


def copy_rows_reference(rows_UC: Tensor, plan: SentencePlan) -> Tensor:
    """Return (S, C); see :func:`comtip_kernels.copy_sentence_rows`."""
    return rows_UC[plan.row_S]
