"""The embedding on Triton kernels as PyTorch operators: compute rows, copy rows, sum over equal tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels import flops
from comtip_kernels.gene_sentence_embedding import triton_kernels as kernels
from comtip_kernels.gene_sentence_embedding.plan import VALUE_SLOT, SentencePlan, plan_sentences
from comtip_kernels.tl_common import cdiv, launch, power_of_2

Maybe = Tensor | None


@torch.library.custom_op("comtip::sentence_rows", mutates_args=())
def sentence_rows(
    token: Tensor,
    kinds: Tensor,
    position: Tensor,
    level: Tensor,
    identity: Maybe,
    gain: Maybe,
    bias: Maybe,
    eps: float,
    token_id: Tensor,
    kind_id: Tensor,
    slot_id: Tensor,
    lo_id: Tensor,
    hi_id: Maybe,
    mix: Maybe,
    identity_id: Maybe,
    genes: int,
    names: int,
) -> Tensor:
    """Return the U distinct rows (U, D) in the dtype of the token table, normalised if there is a gain."""
    U, D = token_id.shape[0], token.shape[1]
    out = torch.empty(U, D, device=token.device, dtype=token.dtype)
    if U:
        tables = [
            (token if t is None else t).contiguous() for t in (token, kinds, position, level, identity, gain, bias)
        ]
        ids = [token_id if i is None else i for i in (token_id, kind_id, slot_id, lo_id, hi_id, mix, identity_id)]
        constants = {"MIXED": mix is not None, "IDENTITY": identity is not None, "NORM": gain is not None}
        launch(kernels.make_rows, (U,), *tables, *ids, out, D, eps, **constants, BD=power_of_2(D), **kernels.MAKE)
    return out


@torch.library.custom_op("comtip::sentence_rows_grads", mutates_args=())
def sentence_rows_grads(
    grad: Tensor,
    token: Tensor,
    kinds: Tensor,
    position: Tensor,
    level: Tensor,
    identity: Maybe,
    gain: Maybe,
    bias: Maybe,
    eps: float,
    token_id: Tensor,
    kind_id: Tensor,
    slot_id: Tensor,
    lo_id: Tensor,
    hi_id: Maybe,
    mix: Maybe,
    identity_id: Maybe,
    genes: int,
    names: int,
) -> list[Tensor]:
    """Return the gradients of token, kinds, position, level, identity, gain and bias, fp32; empty for an operand that is None.

    ``grad`` is fp32 (U, D), already summed over equal tokens and sorted by kind: ``genes`` rows, ``names`` rows, then values.
    """
    U, D = grad.shape
    tables = [(token if t is None else t).contiguous() for t in (token, kinds, position, level, identity)]
    dgain, dbias = grad.new_empty(0), grad.new_empty(0)
    if gain is not None:
        programs = cdiv(U, kernels.NORM_ROWS)
        through, dgains, dbiases = (torch.empty(n, D, device=grad.device) for n in (U, programs, programs))
        if U:
            ids = [token_id if i is None else i for i in (token_id, kind_id, slot_id, lo_id, hi_id, mix, identity_id)]
            tensors = (*tables, gain.contiguous(), grad.contiguous(), *ids, through, dgains, dbiases)
            constants = {"MIXED": mix is not None, "IDENTITY": identity is not None, "ROWS": kernels.NORM_ROWS}
            options = constants | {"BD": power_of_2(D)} | kernels.norm_options(power_of_2(D))
            launch(kernels.norm_grads, (programs,), *tensors, U, D, eps, **options)
        grad, dgain, dbias = through, dgains.sum(0), dbiases.sum(0)
    small = _small_tables_grads(
        grad, kinds.shape[0], position.shape[0], level.shape[0], (kind_id, slot_id, lo_id), hi_id, mix
    )
    # Large tables by sort and segment sum, which torch's embedding backward is. Rows are sorted by kind, so each table's
    # gradient reads its own rows only.
    words = genes + names
    dtoken = torch.ops.aten.embedding_dense_backward(grad[:words], token_id[:words], token.shape[0], -1, False)
    didentity = grad.new_empty(0, D)
    if identity is not None and identity_id is not None:
        own = (grad[:genes], identity_id[:genes], identity.shape[0], 0, False)
        didentity = torch.ops.aten.embedding_dense_backward(*own)
    return [dtoken, *small, didentity, dgain, dbias]


def _small_tables_grads(
    grad: Tensor,
    n_kinds: int,
    n_slots: int,
    n_levels: int,
    ids: tuple[Tensor, Tensor, Tensor],
    hi_id: Maybe,
    mix: Maybe,
) -> list[Tensor]:
    """Return the gradients of the type, position and level tables by one product with one-hot and mixing weights."""
    kind_id, slot_id, lo_id = ids
    one_hot = torch.nn.functional.one_hot
    value = (kind_id == VALUE_SLOT)[:, None]
    level = one_hot(lo_id, n_levels).float() * value
    if mix is not None and hi_id is not None:
        share = mix.float()[:, None]
        level = (1 - share) * level + share * one_hot(hi_id, n_levels).float() * value
    weights = torch.cat([one_hot(kind_id, n_kinds), one_hot(slot_id, n_slots), level], dim=1)
    return [part.clone() for part in (weights.float().T @ grad).split([n_kinds, n_slots, n_levels])]


@torch.library.custom_op("comtip::copy_rows", mutates_args=())
def copy_rows(rows: Tensor, row_S: Tensor, order_S: Tensor, start_U1: Tensor, most: int) -> Tensor:
    """Return rows[row_S], (S, D); the other arguments are for the backward pass."""
    S, D = row_S.shape[0], rows.shape[1]
    out = torch.empty(S, D, device=rows.device, dtype=rows.dtype)
    if S:
        options = kernels.rows_options(kernels.COPY, power_of_2(D))
        launch(kernels.copy_rows, (cdiv(S, options["R"]),), rows.contiguous(), row_S, out, S, D, **options)
    return out


@torch.library.custom_op("comtip::sum_equal_tokens", mutates_args=())
def sum_equal_tokens(grad: Tensor, order_S: Tensor, start_U1: Tensor, most: int) -> Tensor:
    """Return the sum of ``grad`` over the tokens of each row, fp32 (U, D); no row has more than ``most`` tokens."""
    D, U = grad.shape[1], start_U1.shape[0] - 1
    if grad.shape[0] == 0:
        return torch.zeros(U, D, device=grad.device)
    piece = max(kernels.PIECE, power_of_2(math.isqrt(most)))
    row_U = torch.arange(U, device=grad.device, dtype=torch.int32)
    if most <= piece:
        out = torch.empty(U, D, device=grad.device, dtype=torch.float32)
        _sum(grad, order_S, start_U1[:-1].contiguous(), start_U1[1:].contiguous(), row_U, out)
        return out
    # The number of pieces is bounded and not read: no synchronisation. Rows of one piece are complete after the first round;
    # the pieces of other rows are stored after the U rows and added in the second round.
    count_U = (start_U1.diff() + piece - 1) // piece
    begin_U1 = torch.nn.functional.pad(count_U.cumsum(0, dtype=torch.int32), (1, 0))
    piece_P = torch.arange(grad.shape[0] // piece + U, device=grad.device, dtype=torch.int32)
    # int32 as in the other rounds: with int64 targets the kernel is another variant, which spills on sm_90.
    row_P = (torch.searchsorted(begin_U1, piece_P, right=True, out_int32=True) - 1).clamp_max(U - 1)
    first_P = start_U1[row_P] + (piece_P - begin_U1[row_P]) * piece
    # int32 in both rounds, so that the kernel is compiled once.
    target_P = torch.where(count_U[row_P] == 1, row_P.to(torch.int32), U + piece_P)
    target_P = target_P.masked_fill(piece_P >= begin_U1[-1], -1)
    out = torch.empty(U + piece_P.shape[0], D, device=grad.device, dtype=torch.float32)
    _sum(grad, order_S, first_P, torch.minimum(first_P + piece, start_U1[row_P + 1]), target_P, out)
    _sum(out, None, U + begin_U1[:-1], U + begin_U1[1:], row_U.masked_fill(count_U == 1, -1), out)
    return out[:U]


def _sum(x: Tensor, order: Maybe, first: Tensor, last: Tensor, target: Tensor, out: Tensor) -> None:
    """Launch ``sum_pieces``; ``x`` and ``out`` may be the same buffer if no row is both read and written."""
    tensors = (x, target if order is None else order, first, last, target, out)
    options = {"ORDERED": order is not None} | kernels.rows_options(kernels.SUM, power_of_2(x.shape[1]))
    launch(kernels.sum_pieces, (first.shape[0],), *tensors, x.shape[1], *x.stride(), **options)


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


def _setup_copy(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, _, order_S, start_U1, ctx.most = inputs
    ctx.save_for_backward(order_S, start_U1)
    ctx.dtype = rows.dtype


def _copy_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return sum_equal_tokens(grad, *ctx.saved_tensors, ctx.most).to(ctx.dtype), None, None, None, None


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.eps, ctx.counts = inputs[7], inputs[15:]
    ctx.save_for_backward(*inputs[:7], *inputs[8:15])


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    out = sentence_rows_grads(grad.float(), *saved[:7], ctx.eps, *saved[7:], *ctx.counts)
    grads = [None if t is None else g.to(t.dtype) for g, t in zip(out, saved[:7], strict=True)]
    return (*grads, *(None for _ in range(10)))


copy_rows.register_autograd(_copy_backward, setup_context=_setup_copy)
sentence_rows.register_autograd(_rows_backward, setup_context=_setup_rows)


@register_flop_formula(torch.ops.comtip.sentence_rows_grads)
def _small_tables(grad: Any, token: Any, kinds: Any, position: Any, level: Any, *_a: Any, **_k: Any) -> int:
    """Return the FLOPs of the one product; sums and LayerNorm are not counted."""
    return int(flops.sentence_rows_backward(grad[0], grad[1], kinds[0] + position[0] + level[0]))


def gene_sentence_embedding_triton(
    ids_NT: Tensor,
    length_N: Tensor,
    level_lo_N: Tensor,
    token_VD: Tensor,
    type_3D: Tensor,
    position_TD: Tensor,
    level_QD: Tensor,
    *,
    level_hi_N: Maybe = None,
    mix_N: Maybe = None,
    identity_N: Maybe = None,
    identity_ID: Maybe = None,
    gain_D: Maybe = None,
    bias_D: Maybe = None,
    eps: float = 1e-5,
    plan: SentencePlan | None = None,
    distinct: bool = False,
) -> Tensor:
    """Return the embedded tokens y (S, D), or the distinct rows; see :mod:`comtip_kernels.gene_sentence_embedding.reference`."""
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
        token_VD,
        type_3D,
        position_TD,
        level_QD,
        identity_ID,
        gain_D,
        bias_D if gain_D is not None else None,
        eps,
        plan.token_U,
        plan.kind_U,
        plan.slot_U,
        level_lo_N.long()[at],
        None if hi_U is None else hi_U.long(),
        mix_U,
        None if own_U is None else own_U.long(),
        plan.genes,
        plan.names,
    )
    return rows_UD if distinct else copy_rows_triton(rows_UD, plan)


def copy_rows_triton(rows_UC: Tensor, plan: SentencePlan) -> Tensor:
    """Return (S, C); see :func:`comtip_kernels.copy_sentence_rows`."""
    return copy_rows(rows_UC, plan.row_S, plan.order_S, plan.start_U1, plan.most)
