"""Embedding of gene sentences: name tokens, a value slot, type and position rows, summed.

A sentence is ``[GENE] name tokens ... [VALUE]``; its tokens sit in slots 0..length-1 and the value slot is the
last. The value slot's row is the level's row, or two level rows mixed for a value between two levels.

    x[n, t] = token[ids[n, t]] + type[kind(t)] + position[t]       t < length_n - 1
    x[n, t] = (1 - w_n) level[lo_n] + w_n level[hi_n] + type[VALUE] + position[t]      t = length_n - 1
    x[n, t] = 0                                                    t >= length_n
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GENE_SLOT, NAME_SLOT, VALUE_SLOT = 0, 1, 2


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
) -> Tensor:
    """Return x (N, T, D); see the module's formula. ``F.embedding`` keeps the backward repeatable."""
    T = ids_NT.shape[1]
    slot_T = torch.arange(T, device=ids_NT.device)
    value_NT = slot_T == length_N[:, None] - 1
    inside_NT = slot_T < length_N[:, None]
    kind_NT = torch.where(value_NT, VALUE_SLOT, torch.where(slot_T == 0, GENE_SLOT, NAME_SLOT))
    level_ND = F.embedding(level_lo_N, level_QD)
    if level_hi_N is not None and mix_N is not None:
        mix = mix_N[:, None].to(level_ND.dtype)
        level_ND = (1 - mix) * level_ND + mix * F.embedding(level_hi_N, level_QD)
    word_NTD = F.embedding(ids_NT.masked_fill(~inside_NT, 0), token_VD)
    word_NTD = torch.where(value_NT[..., None], level_ND[:, None, :], word_NTD)
    x_NTD = word_NTD + F.embedding(kind_NT, type_3D) + position_TD[:T]
    return x_NTD.masked_fill(~inside_NT[..., None], 0.0)
