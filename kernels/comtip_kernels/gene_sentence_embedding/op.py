"""The Triton path of the embedding as PyTorch operators: make rows, copy rows, sum over equal tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels.gene_sentence_embedding import triton_kernels as kernels
from comtip_kernels.gene_sentence_embedding.plan import VALUE_SLOT, SentencePlan, plan_sentences
from comtip_kernels.tl_common import power_of_2

Maybe = Tensor | None


@torch.library.custom_op("comtip::sentence_rows", mutates_args=())
def sentence_rows(
    token: Tensor, kinds: Tensor, position: Tensor, level: Tensor, identity: Maybe, gain: Maybe, bias: Maybe, eps: float,
    token_id: Tensor, kind_id: Tensor, slot_id: Tensor, lo_id: Tensor, hi_id: Maybe, mix: Maybe, identity_id: Maybe,
    genes: int, names: int,
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
    identity_id: Maybe, genes: int, names: int,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of token, kinds, position, level, identity, gain and bias, fp32 (empty where there is none).

    ``grad`` is fp32 (U, D), summed over equal tokens already and sorted by kind: ``genes`` rows, ``names`` rows, then values. The
    large tables by sort and segment sum (torch's embedding backward, which is that); all small ones by one product with what is
    one-hot, or holds the two shares of a mix.
    """
    U, D = grad.shape
    tables = [(token if t is None else t).contiguous() for t in (token, kinds, position, level, identity)]
    dgain, dbias = grad.new_empty(0), grad.new_empty(0)
    if gain is not None:
        programs = triton.cdiv(U, kernels.NORM_ROWS)
        through, dgains, dbiases = (torch.empty(n, D, device=grad.device) for n in (U, programs, programs))
        if U:
            ids = [token_id if i is None else i for i in (token_id, kind_id, slot_id, lo_id, hi_id, mix, identity_id)]
            kernels.norm_grads[(programs,)](
                *tables, gain.contiguous(), grad.contiguous(), *ids, through, dgains, dbiases, U, D, eps,
                MIXED=mix is not None, IDENTITY=identity is not None, ROWS=kernels.NORM_ROWS, BD=power_of_2(D),
                **kernels.NORM,
            )  # fmt: skip
        grad, dgain, dbias = through, dgains.sum(0), dbiases.sum(0)
    one = torch.nn.functional.one_hot
    value = kind_id == VALUE_SLOT
    low = one(lo_id, level.shape[0]).float() * value[:, None]
    if mix is not None and hi_id is not None:
        share = mix.float()[:, None]
        low = (1 - share) * low + share * one(hi_id, level.shape[0]).float() * value[:, None]
    hot = torch.cat([one(kind_id, kinds.shape[0]), one(slot_id, position.shape[0]), low], dim=1)
    small = (hot.float().T @ grad).split([kinds.shape[0], position.shape[0], level.shape[0]])
    # Rows come sorted by kind, so that each large table's gradient reads its own rows and no others.
    words = genes + names
    dtoken = torch.ops.aten.embedding_dense_backward(grad[:words], token_id[:words], token.shape[0], -1, False)
    didentity = grad.new_empty(0, D)
    if identity is not None and identity_id is not None:
        didentity = torch.ops.aten.embedding_dense_backward(
            grad[:genes], identity_id[:genes], identity.shape[0], 0, False
        )
    return [dtoken, *(s.clone() for s in small), didentity, dgain, dbias]


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
    D, U = grad.shape[1], start_U1.shape[0] - 1
    if grad.shape[0] == 0:
        return torch.zeros(U, D, device=grad.device)
    piece = max(kernels.PIECE, power_of_2(math.isqrt(most)))
    row_U = torch.arange(U, device=grad.device, dtype=torch.int32)
    if most <= piece:
        out = torch.empty(U, D, device=grad.device, dtype=torch.float32)
        _sum(grad, order_S, start_U1[:-1].contiguous(), start_U1[1:].contiguous(), row_U, out)
        return out
    # How many pieces there are is bounded, not read: no synchronisation. A row of one piece is done in the first round; the
    # pieces of others go behind the U rows, and are added up in the second.
    count_U = (start_U1.diff() + piece - 1) // piece
    begin_U1 = torch.nn.functional.pad(count_U.cumsum(0, dtype=torch.int32), (1, 0))
    piece_P = torch.arange(grad.shape[0] // piece + U, device=grad.device, dtype=torch.int32)
    row_P = (torch.searchsorted(begin_U1, piece_P, right=True) - 1).clamp_max(U - 1)
    first_P = start_U1[row_P] + (piece_P - begin_U1[row_P]) * piece
    place_P = torch.where(count_U[row_P] == 1, row_P, U + piece_P).masked_fill(piece_P >= begin_U1[-1], -1)
    out = torch.empty(U + piece_P.shape[0], D, device=grad.device, dtype=torch.float32)
    _sum(grad, order_S, first_P, torch.minimum(first_P + piece, start_U1[row_P + 1]), place_P, out)
    _sum(out, None, U + begin_U1[:-1], U + begin_U1[1:], row_U.masked_fill(count_U == 1, -1), out)
    return out[:U]


def _sum(x: Tensor, order: Maybe, first: Tensor, last: Tensor, place: Tensor, out: Tensor) -> None:
    """Launch ``sum_pieces``; ``x`` and ``out`` may be one buffer where they do not overlap."""
    kernels.sum_pieces[(first.shape[0],)](
        x, place if order is None else order, first, last, place, out, x.shape[1], *x.stride(), ORDERED=order is not None,
        BD=power_of_2(x.shape[1]), **kernels.SUM,
    )  # fmt: skip


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
    ctx.eps, ctx.counts = inputs[7], inputs[15:]
    ctx.save_for_backward(*inputs[:7], *inputs[8:15])


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    out = sentence_rows_grads(grad.float(), *saved[:7], ctx.eps, *saved[7:], *ctx.counts)
    grads = [None if t is None else g.to(t.dtype) for g, t in zip(out, saved[:7], strict=True)]
    return (*grads, *(None for _ in range(10)))


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
        None if own_U is None else own_U.long(), plan.genes, plan.names,
    )  # fmt: skip
    return copy_rows(rows_UD, plan.row_S, plan.order_S, plan.start_U1, plan.most)
