"""Packed attention on Triton kernels as PyTorch operators."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels import flops
from comtip_kernels.gene_sentence_embedding.plan import first_tokens
from comtip_kernels.packed_attention import triton_kernels as kernels
from comtip_kernels.tl_common import INTERPRETING, input_precision, launch, operand_dtype, power_of_2, product_mode


def launch_options(q: Tensor, longest: int, *, backward: bool = False) -> tuple[int, tuple[int], dict[str, Any]]:
    """Return the window W, the grid and the options of a launch for (S, H, E) operands like ``q``."""
    S, H, E = q.shape
    mode = product_mode(q.dtype)
    BT = kernels.best_tile(mode, longest)
    window = BT - longest + 1
    constants = {"BT": BT, "BE": power_of_2(E), "UPCAST": INTERPRETING, "PRECISION": input_precision(mode)}
    return window, (triton.cdiv(S, window) * H,), constants | kernels.config(mode, BT, backward=backward)


@torch.library.custom_op("comtip::packed_attention", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, first_S: Tensor, longest: int) -> Tensor:
    """Return (S, H, E) in the dtype of ``q``; ``first_S`` int32 is the first token of each token's sentence."""
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    if out.numel():
        window, grid, options = launch_options(q, longest)
        strides = (*q.stride(), *k.stride(), *v.stride())
        launch(
            kernels.attention_forward,
            grid,
            q,
            k,
            v,
            first_S,
            out,
            *q.shape,
            window,
            q.shape[2] ** -0.5,
            *strides,
            **options,
        )
    return out


@torch.library.custom_op("comtip::packed_attention_grads", mutates_args=())
def attend_grads(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, first_S: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, (S, H, E) each, from the inputs and the gradient of the output."""
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    if dq.numel():
        window, grid, options = launch_options(q, longest, backward=True)
        tensors = (q, k, v, grad, first_S, dq, dk, dv)
        strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride())
        launch(kernels.attention_grads, grid, *tensors, *q.shape, window, q.shape[2] ** -0.5, *strides, **options)
    return dq, dk, dv


attend.register_fake(lambda q, *rest: q.new_empty(q.shape))
attend_grads.register_fake(lambda q, k, v, *rest: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, first_S, ctx.longest = inputs
    ctx.save_for_backward(q, k, v, first_S)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, first_S = ctx.saved_tensors
    return (*attend_grads(q, k, v, grad.to(q.dtype), first_S, ctx.longest), None, None)


attend.register_autograd(_backward, setup_context=_setup)


register_flop_formula(torch.ops.comtip.packed_attention)(
    lambda q, k, v, f, longest, **_k: int(flops.packed_attention(q[0], q[1], q[2], longest).forward)
)
register_flop_formula(torch.ops.comtip.packed_attention_grads)(
    lambda q, k, v, g, f, longest, **_k: int(flops.packed_attention(q[0], q[1], q[2], longest).backward)
)


def packed_attention_triton(
    q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int, first_S: Tensor | None = None
) -> Tensor:
    """Return (S, H, E) in the operand dtype; see :mod:`comtip_kernels.packed_attention.reference`."""
    dtype = operand_dtype(q_SHE, k_SHE, v_SHE)
    if first_S is None:
        first_S = first_tokens(length_N, q_SHE.shape[0])
    return attend(q_SHE.to(dtype), k_SHE.to(dtype), v_SHE.to(dtype), first_S, longest)
