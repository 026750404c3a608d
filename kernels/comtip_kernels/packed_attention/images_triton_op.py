"""Attention within images of equal numbers of tokens, on the kernels of packed attention, as PyTorch operators with a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels import flops
from comtip_kernels.packed_attention import triton_kernels as kernels
from comtip_kernels.tl_common import INTERPRETING, input_precision, launch, operand_dtype, power_of_2, product_mode


def parts_of(rows: int, tokens: Sequence[int]) -> Iterator[tuple[slice, int, int]]:
    """Yield the rows of each part, its number of images, and the tokens of one of them."""
    images, start = rows // max(1, sum(tokens)), 0
    for T in tokens:
        yield slice(start, start + images * T), images, T
        start += images * T


def _options(dtype: torch.dtype, E: int, tokens: int, *, backward: bool) -> dict[str, Any]:
    mode = product_mode(dtype)
    BT = flops.image_tile(tokens, tuple(tile for m, tile in kernels.LAUNCH if m == mode))
    constants = {
        "EQUAL": True,
        "BT": BT,
        "BE": power_of_2(E),
        "UPCAST": INTERPRETING,
        "PRECISION": input_precision(mode),
    }
    return constants | kernels.config(mode, BT, backward=backward)


@torch.library.custom_op("comtip::image_attention", mutates_args=())
def attend_images(qkv: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return (N, H, E) from (N, 3, H, E): images of ``tokens[0]`` rows each, then as many of ``tokens[1]``, and so on."""
    N, _, H, E = qkv.shape
    out = torch.empty(N, H, E, device=qkv.device, dtype=qkv.dtype)
    for rows, images, T in parts_of(N, tokens):
        if images:
            q, k, v = qkv[rows].unbind(1)
            strides = (*q.stride(), *k.stride(), *v.stride())
            operands = (q, k, v, q, out[rows], images * T, H, E, T, E**-0.5)
            options = _options(qkv.dtype, E, T, backward=False)
            launch(kernels.attention_forward, (images * H,), *operands, *strides, **options)
    return out


@torch.library.custom_op("comtip::image_attention_grads", mutates_args=())
def attend_images_grads(qkv: Tensor, grad: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return the gradient of ``qkv`` from that of the result."""
    N, _, H, E = qkv.shape
    out = torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype)
    for rows, images, T in parts_of(N, tokens):
        if images:
            (q, k, v), g, (dq, dk, dv) = qkv[rows].unbind(1), grad[rows], out[rows].unbind(1)
            strides = (*q.stride(), *k.stride(), *v.stride(), *g.stride())
            operands = (q, k, v, g, q, dq, dk, dv, images * T, H, E, T, E**-0.5)
            options = _options(qkv.dtype, E, T, backward=True)
            launch(kernels.attention_grads, (images * H,), *operands, *strides, PARTS=3, **options)
    return out


attend_images.register_fake(lambda qkv, tokens: qkv.new_empty((qkv.shape[0], *qkv.shape[2:])))
attend_images_grads.register_fake(lambda qkv, grad, tokens: qkv.new_empty(qkv.shape))


def _flops(shape: Sequence[int], tokens: Sequence[int], *, backward: bool) -> int:
    of_parts = [flops.image_attention(images, shape[2], shape[3], T) for _, images, T in parts_of(shape[0], tokens)]
    return int(sum(f.backward if backward else f.forward for f in of_parts))


register_flop_formula(torch.ops.comtip.image_attention)(lambda qkv, n, **_k: _flops(qkv, n, backward=False))
register_flop_formula(torch.ops.comtip.image_attention_grads)(lambda qkv, g, n, **_k: _flops(qkv, n, backward=True))


class _ImageAttention(torch.autograd.Function):
    """Gradient of :func:`image_attention_triton`, which stores q, k and v alone."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, tokens: Sequence[int]) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.tokens = tokens
        return attend_images(qkv, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (qkv,) = ctx.saved_tensors
        return attend_images_grads(qkv, grad.to(qkv.dtype), ctx.tokens), None


def image_attention_triton(qkv_N3HE: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return (N, H, E) in the operand dtype; see :func:`comtip_kernels.image_attention`."""
    out: Tensor = _ImageAttention.apply(qkv_N3HE.to(operand_dtype(qkv_N3HE)), list(tokens))
    return out
