"""Packed attention on Triton kernels as PyTorch operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels import flops
from comtip_kernels.gene_sentence_embedding.plan import first_tokens
from comtip_kernels.packed_attention import triton_kernels as kernels
from comtip_kernels.tl_common import (
    INTERPRETING,
    cdiv,
    input_precision,
    launch,
    operand_dtype,
    power_of_2,
    product_mode,
)


def launch_options(q: Tensor, longest: int, *, backward: bool = False) -> tuple[int, tuple[int], dict[str, Any]]:
    """Return the window W, the grid and the options of a launch for (S, H, E) operands like ``q``."""
    S, H, E = q.shape
    mode = product_mode(q.dtype)
    BT = kernels.best_tile(mode, longest)
    window = BT - longest + 1
    constants = {"BT": BT, "BE": power_of_2(E), "UPCAST": INTERPRETING, "PRECISION": input_precision(mode)}
    return window, (cdiv(S, window) * H,), constants | kernels.config(mode, BT, backward=backward)


def _forward(q: Tensor, k: Tensor, v: Tensor, first_S: Tensor, longest: int) -> Tensor:
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    if out.numel():
        window, grid, options = launch_options(q, longest)
        strides = (*q.stride(), *k.stride(), *v.stride())
        tensors = (q, k, v, q, first_S, out)
        sizes = (*q.shape, window, q.shape[2] ** -0.5)
        launch(kernels.attention_forward, grid, *tensors, *sizes, *strides, EQUAL=False, BIAS=False, **options)
    return out


def _backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, first_S: Tensor, longest: int, results: Sequence[Tensor]
) -> None:
    """Store the gradients of q, k and v in ``results``: contiguous (S, H, E), or the parts of one (S, 3, H, E)."""
    if results[0].numel():
        window, grid, options = launch_options(q, longest, backward=True)
        tensors = (q, k, v, grad, q, first_S, *results, q)
        strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride())
        options["PARTS"] = results[0].stride(0) // (q.shape[1] * q.shape[2])
        sizes = (*q.shape, window, q.shape[2] ** -0.5)
        launch(kernels.attention_grads, grid, *tensors, *sizes, *strides, EQUAL=False, BIAS=False, **options)


@torch.library.custom_op("comtip::packed_attention", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, first_S: Tensor, longest: int) -> Tensor:
    """Return (S, H, E) in the dtype of ``q``; ``first_S`` int32 is the first token of each token's sentence."""
    return _forward(q, k, v, first_S, longest)


@torch.library.custom_op("comtip::packed_attention_grads", mutates_args=())
def attend_grads(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, first_S: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, (S, H, E) each, from the inputs and the gradient of the output."""
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    _backward(q, k, v, grad, first_S, longest, (dq, dk, dv))
    return dq, dk, dv


@torch.library.custom_op("comtip::packed_attention_qkv", mutates_args=())
def attend_qkv(qkv: Tensor, first_S: Tensor, longest: int) -> Tensor:
    """Return (S, H, E) from one tensor (S, 3, H, E); see :func:`attend`."""
    q, k, v = qkv.unbind(1)
    return _forward(q, k, v, first_S, longest)


@torch.library.custom_op("comtip::packed_attention_qkv_grads", mutates_args=())
def attend_qkv_grads(qkv: Tensor, grad: Tensor, first_S: Tensor, longest: int) -> Tensor:
    """Return the gradient of ``qkv``, (S, 3, H, E): three results would have to be copied into one tensor."""
    out, (q, k, v) = torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype), qkv.unbind(1)
    _backward(q, k, v, grad, first_S, longest, out.unbind(1))
    return out


attend.register_fake(lambda q, *rest: q.new_empty(q.shape))
attend_grads.register_fake(lambda q, k, v, *rest: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)))
attend_qkv.register_fake(lambda qkv, *rest: qkv.new_empty((qkv.shape[0], *qkv.shape[2:])))
attend_qkv_grads.register_fake(lambda qkv, *rest: qkv.new_empty(qkv.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.longest = inputs
    ctx.save_for_backward(*tensors)


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, first_S = ctx.saved_tensors
    return (*attend_grads(q, k, v, grad.to(q.dtype), first_S, ctx.longest), None, None)


def _qkv_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qkv, first_S = ctx.saved_tensors
    return attend_qkv_grads(qkv, grad.to(qkv.dtype), first_S, ctx.longest), None, None


attend.register_autograd(_grads, setup_context=_save)
attend_qkv.register_autograd(_qkv_grads, setup_context=_save)


def _flops(shape: Sequence[int], longest: int) -> flops.Flops:
    """Return the FLOPs for q, k and v of a shape that begins with the tokens and ends with heads and their width."""
    return flops.packed_attention(shape[0], shape[-2], shape[-1], longest)


register_flop_formula(torch.ops.comtip.packed_attention)(lambda q, k, v, f, n, **_k: int(_flops(q, n).forward))
register_flop_formula(torch.ops.comtip.packed_attention_grads)(
    lambda q, k, v, g, f, n, **_k: int(_flops(q, n).backward)
)
register_flop_formula(torch.ops.comtip.packed_attention_qkv)(lambda qkv, f, n, **_k: int(_flops(qkv, n).forward))
register_flop_formula(torch.ops.comtip.packed_attention_qkv_grads)(
    lambda qkv, g, f, n, **_k: int(_flops(qkv, n).backward)
)


def packed_attention_triton(
    q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int, first_S: Tensor | None = None
) -> Tensor:
    """Return (S, H, E) in the operand dtype; see :mod:`comtip_kernels.packed_attention.reference`."""
    dtype = operand_dtype(q_SHE, k_SHE, v_SHE)
    if first_S is None:
        first_S = first_tokens(length_N, q_SHE.shape[0])
    return attend(q_SHE.to(dtype), k_SHE.to(dtype), v_SHE.to(dtype), first_S, longest)


def packed_attention_qkv_triton(
    qkv_S3HE: Tensor, length_N: Tensor, longest: int, first_S: Tensor | None = None
) -> Tensor:
    """Return (S, H, E) in the operand dtype; see :func:`comtip_kernels.packed_attention_qkv`."""
    if first_S is None:
        first_S = first_tokens(length_N, qkv_S3HE.shape[0])
    return attend_qkv(qkv_S3HE.to(operand_dtype(qkv_S3HE)), first_S, longest)
