"""Attention with one query per sentence and head on Triton kernels, as PyTorch operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels import flops
from comtip_kernels.gene_sentence_embedding.plan import sentence_start
from comtip_kernels.one_query_attention import triton_kernels as kernels
from comtip_kernels.tiles import one_query_tiles
from comtip_kernels.tl_common import INTERPRETING, input_precision, launch, operand_dtype, product_mode


def launch_options(query: Tensor, longest: int) -> dict[str, Any]:
    """Return the constants and options of a launch for (N, H, D) queries."""
    _, H, D = query.shape
    mode = product_mode(query.dtype)
    return one_query_tiles(mode, H, D, longest) | {"UPCAST": INTERPRETING, "PRECISION": input_precision(mode)}


@torch.library.custom_op("comtip::one_query_attention", mutates_args=())
def attend(query: Tensor, x: Tensor, first_M: Tensor, length_M: Tensor, longest: int, scale: float) -> Tensor:
    """Return (N, H, D) in the dtype of ``query``, which is that of ``x``; first tokens and lengths of M >= N sentences."""
    out = torch.empty(query.shape, device=query.device, dtype=query.dtype)
    if out.numel():
        options = launch_options(query, longest)
        tensors = (query, x, first_M, length_M, out)
        sizes = (*query.shape[1:], scale, *query.stride(), *x.stride())
        launch(kernels.one_query_forward, (query.shape[0],), *tensors, *sizes, **options)
    return out


@torch.library.custom_op("comtip::one_query_attention_grads", mutates_args=())
def attend_grads(
    query: Tensor, x: Tensor, grad: Tensor, first_M: Tensor, length_M: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``query`` (N, H, D) and ``x`` (S, D)."""
    dquery, dx = (torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (query, x))
    if first_M.numel():
        options = launch_options(query, longest)
        tensors = (query, x, grad, first_M, length_M, dquery, dx)
        sizes = (*query.shape, scale, *query.stride(), *x.stride(), *grad.stride())
        launch(kernels.one_query_grads, (first_M.shape[0],), *tensors, *sizes, **options)
    return dquery, dx


attend.register_fake(lambda query, *rest: query.new_empty(query.shape))
attend_grads.register_fake(lambda query, x, *rest: (query.new_empty(query.shape), x.new_empty(x.shape)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, x, first_M, length_M = ctx.saved_tensors
    both = attend_grads(query, x, grad.to(query.dtype), first_M, length_M, ctx.longest, ctx.scale)
    return (*both, None, None, None, None)


attend.register_autograd(_grads, setup_context=_save)


def _flops(query: Any, longest: int) -> flops.Flops:
    return flops.one_query_attention(query[0], query[1], query[2], longest)


register_flop_formula(torch.ops.comtip.one_query_attention)(lambda q, x, f, l, n, *_a, **_k: int(_flops(q, n).forward))
register_flop_formula(torch.ops.comtip.one_query_attention_grads)(
    lambda q, x, g, f, l, n, *_a, **_k: int(_flops(q, n).backward)
)


def one_query_attention_triton(
    query_NHD: Tensor, x_SD: Tensor, length_M: Tensor, longest: int, scale: float, first_M: Tensor | None = None
) -> Tensor:
    """Return (N, H, D) in the operand dtype; see :mod:`comtip_kernels.one_query_attention.reference`."""
    dtype = operand_dtype(query_NHD, x_SD)
    if first_M is None:
        first_M = sentence_start(length_M)
    return attend(query_NHD.to(dtype), x_SD.to(dtype), first_M, length_M, longest, scale)
