"""The Triton path of the embedding as PyTorch operators: make rows, copy rows, sum over equal tokens."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels.gene_sentence_embedding import triton_kernels as kernels
from comtip_kernels.gene_sentence_embedding.plan import GENE_SLOT, VALUE_SLOT, SentencePlan, plan_sentences
from comtip_kernels.tl_common import power_of_2

Maybe = Tensor | None


@torch.library.custom_op("comtip::sentence_rows", mutates_args=())
def sentence_rows(
    token: Tensor, kinds: Tensor, position: Tensor, level: Tensor, identity: Maybe, gain: Maybe, bias: Maybe, eps: float,
    token_id: Tensor, kind_id: Tensor, slot_id: Tensor, lo_id: Tensor, hi_id: Maybe, mix: Maybe, identity_id: Maybe,
) -> Tensor:  # fmt: skip
    """Return the U different rows, normalised where there is a gain, in the tables' dtype (U, D)."""
    U, D = token_id.shape[0], token.shape[1]
    out = torch.empty(U, D, device=token.device, dtype=token.dtype)
    if U:
        tables = [
            (token if t is None else t).contiguous() for t in (token, kinds, position, level, identity, gain, bias)
        ]
        ids = [token_id if i is None else i for i in (token_id, kind_id, slot_id, lo_id, hi_id, mix, identity_id)]
        kernels.make_rows[(U,)](
            *tables, *ids, out, D, eps, MIXED=mix is not None, IDENTITY=identity is not None, NORM=gain is not None,
            BD=power_of_2(D), **kernels.MAKE,
        )  # fmt: skip
    return out


@torch.library.custom_op("comtip::sentence_rows_grads", mutates_args=())
def sentence_rows_grads(
    grad: Tensor, token: Tensor, kinds: Tensor, position: Tensor, level: Tensor, identity: Maybe, gain: Maybe, bias: Maybe,
    eps: float, token_id: Tensor, kind_id: Tensor, slot_id: Tensor, lo_id: Tensor, hi_id: Maybe, mix: Maybe,
    identity_id: Maybe,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of token, kinds, position, level, identity, gain and bias, fp32 (empty where there is none).

    ``grad`` is fp32 (U, D), already summed over equal tokens, so all of this is small. The large tables by sort and segment sum
    (torch's embedding backward, which is that); all small ones by one product with what is one-hot, or holds the two shares
    of a mix.
    """
    D = token.shape[1]
    value = kind_id == VALUE_SLOT
    dgain, dbias = grad.new_empty(0), grad.new_empty(0)
    if gain is not None:
        x = _sum_of_rows(
            token, kinds, position, level, identity, token_id, kind_id, slot_id, lo_id, hi_id, mix, identity_id
        )
        x = x - x.mean(1, keepdim=True)
        rstd = torch.rsqrt(x.square().mean(1, keepdim=True) + eps)
        x = x * rstd
        dgain, dbias = (grad * x).sum(0), grad.sum(0)
        grad = grad * gain.float()
        grad = rstd * (grad - grad.mean(1, keepdim=True) - x * (grad * x).mean(1, keepdim=True))
    one = torch.nn.functional.one_hot
    low = one(lo_id, level.shape[0]).float() * value[:, None]
    if mix is not None and hi_id is not None:
        share = mix.float()[:, None]
        low = (1 - share) * low + share * one(hi_id, level.shape[0]).float() * value[:, None]
    hot = torch.cat([one(kind_id, kinds.shape[0]), one(slot_id, position.shape[0]), low], dim=1)
    small = (hot.float().T @ grad).split([kinds.shape[0], position.shape[0], level.shape[0]])
    dtoken = torch.ops.aten.embedding_dense_backward(grad * ~value[:, None], token_id, token.shape[0], -1, False)
    didentity = grad.new_empty(0, D)
    if identity is not None and identity_id is not None:
        own = torch.where(kind_id == GENE_SLOT, identity_id, 0)
        didentity = torch.ops.aten.embedding_dense_backward(grad.contiguous(), own, identity.shape[0], 0, False)
    return [dtoken, *(s.clone() for s in small), didentity, dgain, dbias]


def _sum_of_rows(
    token: Tensor, kinds: Tensor, position: Tensor, level: Tensor, identity: Maybe, token_id: Tensor, kind_id: Tensor,
    slot_id: Tensor, lo_id: Tensor, hi_id: Maybe, mix: Maybe, identity_id: Maybe,
) -> Tensor:  # fmt: skip
    """Return the rows before LayerNorm again, fp32 (U, D)."""
    word = level[lo_id].float()
    if mix is not None and hi_id is not None:
        share = mix.float()[:, None]
        word = (1 - share) * word + share * level[hi_id].float()
    word = torch.where((kind_id == VALUE_SLOT)[:, None], word, token[token_id].float())
    if identity is not None and identity_id is not None:
        known = (kind_id == GENE_SLOT) & (identity_id > 0)
        word = word + identity[identity_id].float() * known[:, None]
    return word + kinds[kind_id].float() + position[slot_id].float()


@torch.library.custom_op("comtip::copy_rows", mutates_args=())
def copy_rows(rows: Tensor, row_S: Tensor, order_S: Tensor, start_U1: Tensor, most: int) -> Tensor:
    """Return rows[row_S], (S, D); the rest is what the backward needs."""
    S, D = row_S.shape[0], rows.shape[1]
    out = torch.empty(S, D, device=rows.device, dtype=rows.dtype)
    if S:
        R = kernels.COPY["R"]
        kernels.copy_rows[(triton.cdiv(S, R),)](rows.contiguous(), row_S, out, S, D, BD=power_of_2(D), **kernels.COPY)
    return out


@torch.library.custom_op("comtip::sum_equal_tokens", mutates_args=())
def sum_equal_tokens(grad: Tensor, order_S: Tensor, start_U1: Tensor, most: int) -> Tensor:
    """Return the sum of grad over the tokens of each row, fp32 (U, D); ``most`` tokens in the longest sum."""
    D = grad.shape[1]
    if grad.shape[0] == 0:
        return torch.zeros(start_U1.shape[0] - 1, D, device=grad.device)
    x, order, start = grad, order_S, start_U1
    while True:
        first, last, pieces = _pieces(start, x.shape[0], most)
        out = torch.empty(first.shape[0], D, device=grad.device, dtype=torch.float32)
        kernels.sum_pieces[(first.shape[0],)](
            x, order, first, last, out, D, *x.stride(), ORDERED=order is order_S, BD=power_of_2(D), **kernels.SUM
        )
        if most <= kernels.PIECE:
            return out
        # The pieces of a row lie side by side now: they are the next round's tokens.
        x, order, start, most = out, start_U1, pieces, triton.cdiv(most, kernels.PIECE)


def _pieces(start: Tensor, tokens: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return first and last token of each piece, and where each row's pieces begin; pieces past the last are empty.

    How many there are is bounded, not read: no synchronisation.
    """
    if most <= kernels.PIECE:
        return start[:-1].contiguous(), start[1:].contiguous(), start
    count = (start.diff() + kernels.PIECE - 1) // kernels.PIECE
    begins = torch.cat([count.new_zeros(1), count.cumsum(0)])
    bound = tokens // kernels.PIECE + count.shape[0]
    piece = torch.arange(bound, device=start.device)
    row = (torch.searchsorted(begins, piece, right=True) - 1).clamp_max(count.shape[0] - 1)
    first = start[row] + (piece - begins[row]) * kernels.PIECE
    last = torch.minimum(first + kernels.PIECE, start[row + 1])
    return first, torch.maximum(first, last), begins


@sentence_rows.register_fake
def _(token: Tensor, *rest: Any) -> Tensor:
    return token.new_empty(rest[7].shape[0], token.shape[1])


@sentence_rows_grads.register_fake
def _(grad: Tensor, *rest: Any) -> list[Tensor]:
    *tables, identity, gain = rest[:6]
    D = grad.shape[1]
    rows = [t.shape[0] for t in tables] + [0 if identity is None else identity.shape[0]]
    norm = [grad.new_empty(0 if gain is None else D) for _ in range(2)]
    return [*(grad.new_empty(n, D) for n in rows), *norm]


@copy_rows.register_fake
def _(rows: Tensor, row_S: Tensor, *rest: Any) -> Tensor:
    return rows.new_empty(row_S.shape[0], rows.shape[1])


@sum_equal_tokens.register_fake
def _(grad: Tensor, order_S: Tensor, start_U1: Tensor, most: int) -> Tensor:
    return grad.new_empty(start_U1.shape[0] - 1, grad.shape[1], dtype=torch.float32)


def _keep_copy(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, _, order_S, start_U1, ctx.most = inputs
    ctx.save_for_backward(order_S, start_U1)
    ctx.dtype = rows.dtype


def _copy_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return sum_equal_tokens(grad, *ctx.saved_tensors, ctx.most).to(ctx.dtype), None, None, None, None


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.eps = inputs[7]
    ctx.save_for_backward(*inputs[:7], *inputs[8:])


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    out = sentence_rows_grads(grad.float(), *saved[:7], ctx.eps, *saved[7:])
    grads = [None if t is None else g.to(t.dtype) for g, t in zip(out, saved[:7], strict=True)]
    return (*grads, None, *(None for _ in saved[7:]))


copy_rows.register_autograd(_copy_backward, setup_context=_keep_copy)
sentence_rows.register_autograd(_rows_backward, setup_context=_keep_rows)


@register_flop_formula(torch.ops.comtip.sentence_rows_grads)
def _small_tables(grad: Any, token: Any, kinds: Any, position: Any, level: Any, *_a: Any, **_k: Any) -> int:
    """Count the one product; sums and LayerNorm are not products."""
    return int(2 * grad[0] * grad[1] * (kinds[0] + position[0] + level[0]))


def gene_sentence_embedding_triton(
    ids_NT: Tensor, length_N: Tensor, level_lo_N: Tensor, token_VD: Tensor, type_3D: Tensor, position_TD: Tensor,
    level_QD: Tensor, *, level_hi_N: Maybe = None, mix_N: Maybe = None, identity_N: Maybe = None, identity_ID: Maybe = None,
    gain_D: Maybe = None, bias_D: Maybe = None, eps: float = 1e-5, plan: SentencePlan | None = None,
) -> Tensor:  # fmt: skip
    """Return y (S, D); see :mod:`comtip_kernels.gene_sentence_embedding.reference`."""
    if plan is None:
        own = identity_N if identity_ID is not None else None
        plan = plan_sentences(ids_NT, length_N, level_lo_N, identity_N=own, mixed=mix_N is not None)
    at = plan.sentence_U
    hi_U, mix_U, own_U = (
        None if t is None else t[at] for t in (level_hi_N, mix_N, None if identity_ID is None else identity_N)
    )
    if gain_D is not None and bias_D is None:
        bias_D = torch.zeros_like(gain_D)
    rows_UD = sentence_rows(
        token_VD, type_3D, position_TD, level_QD, identity_ID, gain_D, bias_D if gain_D is not None else None, eps,
        plan.token_U, plan.kind_U, plan.slot_U, level_lo_N.long()[at], None if hi_U is None else hi_U.long(), mix_U,
        None if own_U is None else own_U.long(),
    )  # fmt: skip
    return copy_rows(rows_UD, plan.row_S, plan.order_S, plan.start_U1, plan.most)
