"""Residual sum with LayerNorm, and bias with GELU, on Triton kernels as PyTorch operators with gradients.

Gradients are those of ``torch.autograd.Function``: a call of it takes the host half as long as one of an operator with a registered
gradient, and a block has three. ``torch.compile`` sees the operators; otherwise their functions are called directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from comtip_kernels import tiles
from comtip_kernels.block_pointwise import triton_kernels as kernels
from comtip_kernels.tl_common import cdiv, launch

Maybe = Tensor | None


def _norm(
    x: Tensor, branch: Tensor, branch_bias: Tensor, gain: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum (N, d), norm (N, d) in ``dtype``, and mean and reciprocal deviation of every row (2, N), fp32."""
    N, d = x.shape
    stream = torch.empty_like(x)
    out = torch.empty_like(x, dtype=dtype)
    stats = x.new_empty((2, N), dtype=torch.float32)
    if N:
        options = tiles.norm_tiles(d)
        tensors = (x, branch, branch_bias, gain, bias, stream, out, stats)
        launch(kernels.residual_norm, (cdiv(N, options["R"]),), *tensors, N, d, eps, **options)
    return stream, out, stats


def _norm_grads(
    grad: Tensor, stream_grad: Maybe, stream: Tensor, stats: Tensor, gain: Tensor, branch: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the sum, the same in the dtype ``branch``, and the sums of gradients (3, d), fp32.

    The second is empty if ``branch`` is the dtype of the sum.
    """
    (N, d), ROWS = stream.shape, tiles.POINTWISE_ROWS
    copy = branch != stream.dtype
    dx = torch.empty_like(stream)
    dbranch = stream.new_empty(stream.shape if copy else (0,), dtype=branch)
    sums = stream.new_empty((cdiv(N, ROWS), 3, d), dtype=torch.float32)
    if N:
        tensors = (grad, grad if stream_grad is None else stream_grad, stream, stats, gain)
        constants = {"STREAM_GRAD": stream_grad is not None, "COPY": copy, "ROWS": ROWS}
        options = constants | tiles.norm_grads_tiles(d)
        results = (dx, dbranch if copy else dx, sums)
        launch(kernels.residual_norm_grads, (sums.shape[0],), *tensors, *results, N, d, **options)
    return dx, dbranch, sums.sum(0)


def _gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(x + bias) (N, d) in the dtype of ``x``."""
    N, d = x.shape
    out = torch.empty_like(x)
    if N:
        options = tiles.GELU
        grid = cdiv(N, options["R"]) * cdiv(d, options["BD"])
        launch(kernels.bias_gelu, (grid,), x, bias, out, N, d, **options)
    return out


def _gelu_grads(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``x`` in its dtype, and that of ``bias`` in fp32."""
    (N, d), ROWS, options = x.shape, tiles.POINTWISE_ROWS, tiles.GELU_GRADS
    dx = torch.empty_like(x)
    sums = x.new_empty((cdiv(N, ROWS), d), dtype=torch.float32)
    if N:
        grid = sums.shape[0] * cdiv(d, options["BD"])
        launch(kernels.bias_gelu_grads, (grid,), grad, x, bias, dx, sums, N, d, ROWS=ROWS, **options)
    return dx, sums.sum(0)


norm_op = torch.library.custom_op("comtip::residual_norm", _norm, mutates_args=())
norm_grads_op = torch.library.custom_op("comtip::residual_norm_grads", _norm_grads, mutates_args=())
gelu_op = torch.library.custom_op("comtip::bias_gelu", _gelu, mutates_args=())
gelu_grads_op = torch.library.custom_op("comtip::bias_gelu_grads", _gelu_grads, mutates_args=())


@norm_op.register_fake
def _(
    x: Tensor, branch: Tensor, branch_bias: Tensor, gain: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Any:
    stats = x.new_empty((2, x.shape[0]), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), stats


@norm_grads_op.register_fake
def _(grad: Tensor, stream_grad: Maybe, stream: Tensor, stats: Tensor, gain: Tensor, branch: torch.dtype) -> Any:
    dbranch = stream.new_empty((0,) if branch == stream.dtype else stream.shape, dtype=branch)
    return stream.new_empty(stream.shape), dbranch, stream.new_empty((3, stream.shape[1]), dtype=torch.float32)


gelu_op.register_fake(lambda x, bias: x.new_empty(x.shape))
gelu_grads_op.register_fake(lambda grad, x, bias: (x.new_empty(x.shape), x.new_empty(x.shape[1:], dtype=torch.float32)))


class _ResidualNorm(torch.autograd.Function):
    """Gradients of :func:`residual_norm_triton`; the sum and its statistics are stored."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        stream, out, stats = (norm_op if torch.compiler.is_compiling() else _norm)(*given)
        ctx.save_for_backward(stream, stats, given[3])
        ctx.branch = given[1].dtype
        ctx.set_materialize_grads(False)
        return stream, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, stream_grad: Maybe, grad: Maybe) -> tuple[Tensor | None, ...]:
        stream, stats, gain = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(stream)  # nothing read the norm
        stream_grad = None if stream_grad is None else stream_grad.contiguous()
        run = norm_grads_op if torch.compiler.is_compiling() else _norm_grads
        dx, dbranch, sums = run(grad.contiguous(), stream_grad, stream, stats, gain, ctx.branch)
        dgain, dbias, dbranch_bias = sums.unbind(0)
        return dx, dx if ctx.branch == dx.dtype else dbranch, dbranch_bias, dgain, dbias, None, None


class _BiasGelu(torch.autograd.Function):
    """Gradients of :func:`bias_gelu_triton`; the operands are stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return (gelu_op if torch.compiler.is_compiling() else _gelu)(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        run = gelu_grads_op if torch.compiler.is_compiling() else _gelu_grads
        out: tuple[Tensor, Tensor] = run(grad.contiguous(), *ctx.saved_tensors)
        return out


def residual_norm_triton(
    x: Tensor, branch: Tensor, branch_bias: Tensor, gain: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the sum and its LayerNorm; see :func:`comtip_kernels.residual_norm`."""
    operands = [t.contiguous() for t in (x, branch, branch_bias, gain, bias)]
    out: tuple[Tensor, Tensor] = _ResidualNorm.apply(*operands, eps, dtype)
    return out


def bias_gelu_triton(x: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(x + bias); see :func:`comtip_kernels.bias_gelu`."""
    out: Tensor = _BiasGelu.apply(x.contiguous(), bias.contiguous())
    return out
