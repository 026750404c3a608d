"""The embedding on a CPU: each distinct row is computed once and copied; gradients are summed over equal tokens first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comtip_kernels.gene_sentence_embedding.plan import GENE_SLOT, VALUE_SLOT, SentencePlan, plan_sentences


def distinct_rows(
    plan: SentencePlan,
    level_lo_N: Tensor,
    token_VD: Tensor,
    type_3D: Tensor,
    position_TD: Tensor,
    level_QD: Tensor,
    level_hi_N: Tensor | None,
    mix_N: Tensor | None,
    identity_N: Tensor | None,
    identity_ID: Tensor | None,
) -> Tensor:
    """Return the U distinct rows before LayerNorm, (U, D)."""
    value_U = plan.kind_U == VALUE_SLOT
    level_UD = F.embedding(level_lo_N.long()[plan.sentence_U], level_QD)
    if level_hi_N is not None and mix_N is not None:
        mix = mix_N[plan.sentence_U, None].to(level_UD.dtype)
        level_UD = (1 - mix) * level_UD + mix * F.embedding(level_hi_N.long()[plan.sentence_U], level_QD)
    word_UD = torch.where(value_U[:, None], level_UD, F.embedding(plan.token_U.masked_fill(value_U, 0), token_VD))
    if identity_N is not None and identity_ID is not None:
        own_U = torch.where(plan.kind_U == GENE_SLOT, identity_N.long()[plan.sentence_U], 0)
        word_UD = word_UD + F.embedding(own_U, identity_ID) * (own_U > 0).to(identity_ID.dtype)[:, None]
    return word_UD + F.embedding(plan.kind_U, type_3D) + F.embedding(plan.slot_U, position_TD)


class _CopyRows(torch.autograd.Function):
    """Return rows[row_S]; the backward pass sums the gradients of equal tokens, each sum by one thread in a fixed order."""

    @staticmethod
    def forward(ctx: Any, rows_UD: Tensor, row_S: Tensor, order_S: Tensor, start_U1: Tensor) -> Tensor:
        ctx.save_for_backward(order_S, start_U1)
        return rows_UD.index_select(0, row_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order_S, start_U1 = ctx.saved_tensors
        # An embedding bag over the gradients is the fastest segment sum in torch.
        return F.embedding_bag(order_S, grads[0].contiguous(), start_U1[:-1], mode="sum"), None, None, None


def gene_sentence_embedding_cpu(
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
    """Return the embedded tokens y (S, D), or the distinct rows; see :mod:`comtip_kernels.gene_sentence_embedding.reference`."""
    if plan is None:
        own = identity_N if identity_ID is not None else None
        plan = plan_sentences(ids_NT, length_N, level_lo_N, identity_N=own, mixed=mix_N is not None)
    x_UD = distinct_rows(
        plan, level_lo_N, token_VD, type_3D, position_TD, level_QD, level_hi_N, mix_N, identity_N, identity_ID
    )
    if gain_D is not None:
        x_UD = F.layer_norm(x_UD, x_UD.shape[-1:], gain_D, bias_D, eps)
    return x_UD if distinct else copy_rows_cpu(x_UD, plan)


def copy_rows_cpu(rows_UC: Tensor, plan: SentencePlan) -> Tensor:
    """Return (S, C); see :func:`comtip_kernels.copy_sentence_rows`."""
    return _CopyRows.apply(rows_UC, plan.row_S, plan.order_S, plan.start_U1)
