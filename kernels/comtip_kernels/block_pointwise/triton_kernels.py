"""Triton kernels of the work between the products of a pre-norm block: residual sum and LayerNorm, bias and GELU.

``residual_norm`` reads the stream and a branch once, and stores their sum and its norm. ``residual_norm_grads`` adds the gradient
that arrives through the norm to that of the stream, and stores the sum in the dtypes of both; gradients of gain, bias and the
branch's bias are partial sums over ``ROWS`` rows, which the caller adds. ``bias_gelu_grads`` does the same for a linear layer
followed by GELU. No atomics: every sum has a fixed order. Statistics and sums are fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The number of rows changes from step to step.
_SIZES = ["n_rows"]


@triton.jit(do_not_specialize=_SIZES)
def residual_norm(  # type: ignore[no-untyped-def]
    x_ptr,
    branch_ptr,
    branch_bias_ptr,
    gain_ptr,
    bias_ptr,
    stream_ptr,
    out_ptr,
    stats_ptr,
    n_rows,
    width,
    eps,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """Store x + branch + branch_bias and its LayerNorm, of R rows; ``stats`` (2, n_rows): mean, reciprocal deviation."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    dim = tl.arange(0, BD)
    inside = (row[:, None] < n_rows) & (dim[None, :] < width)
    offset = row.to(tl.int64)[:, None] * width + dim[None, :]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(branch_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(branch_bias_ptr + dim, mask=dim < width, other=0.0).to(tl.float32)[None, :]
    # The norm is that of the stored value, from which the backward pass computes it again.
    x = x.to(stream_ptr.dtype.element_ty)
    tl.store(stream_ptr + offset, x, mask=inside)
    x = x.to(tl.float32)
    mean = tl.sum(tl.where(inside, x, 0.0), axis=1) / width
    x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    gain = tl.load(gain_ptr + dim, mask=dim < width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + dim, mask=dim < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, x * rstd[:, None] * gain[None, :] + bias[None, :], mask=inside)
    tl.store(stats_ptr + row, mean, mask=row < n_rows)
    tl.store(stats_ptr + n_rows + row, rstd, mask=row < n_rows)


@triton.jit(do_not_specialize=_SIZES)
def residual_norm_grads(  # type: ignore[no-untyped-def]
    grad_ptr,
    stream_grad_ptr,
    stream_ptr,
    stats_ptr,
    gain_ptr,
    dx_ptr,
    dbranch_ptr,
    sums_ptr,
    n_rows,
    width,
    STREAM_GRAD: tl.constexpr,
    COPY: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """Store the gradient of the sum for ROWS rows, in the stream's dtype and with COPY also in the branch's.

    ``sums`` (programs, 3, width) gets the sums over these rows of the gradients of gain, bias and the branch's bias.
    """
    first = tl.program_id(0) * ROWS
    dim = tl.arange(0, BD)
    gain = tl.load(gain_ptr + dim, mask=dim < width, other=0.0).to(tl.float32)
    dgain = tl.zeros((R, BD), dtype=tl.float32)
    dbias = tl.zeros((R, BD), dtype=tl.float32)
    total = tl.zeros((R, BD), dtype=tl.float32)
    for start in range(first, tl.minimum(first + ROWS, n_rows), R):
        row = start + tl.arange(0, R)
        inside = (row[:, None] < n_rows) & (dim[None, :] < width)
        offset = row.to(tl.int64)[:, None] * width + dim[None, :]
        mean = tl.load(stats_ptr + row, mask=row < n_rows, other=0.0)
        rstd = tl.load(stats_ptr + n_rows + row, mask=row < n_rows, other=0.0)
        x = tl.load(stream_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        g = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        dgain += g * x
        dbias += g
        g = g * gain[None, :]
        g -= tl.sum(g, axis=1)[:, None] / width + x * (tl.sum(g * x, axis=1)[:, None] / width)
        g = g * rstd[:, None]
        if STREAM_GRAD:
            g += tl.load(stream_grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offset, g, mask=inside)
        if COPY:
            tl.store(dbranch_ptr + offset, g, mask=inside)
        total += g
    sums = sums_ptr + tl.program_id(0) * 3 * width + dim
    tl.store(sums, tl.sum(dgain, axis=0), mask=dim < width)
    tl.store(sums + width, tl.sum(dbias, axis=0), mask=dim < width)
    tl.store(sums + 2 * width, tl.sum(total, axis=0), mask=dim < width)


@triton.jit
def _cdf(x):  # type: ignore[no-untyped-def]
    """Return the cumulative distribution function of the standard normal distribution."""
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=_SIZES)
def bias_gelu(x_ptr, bias_ptr, out_ptr, n_rows, width, R: tl.constexpr, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store GELU(x + bias) of a tile of R rows and BD columns."""
    blocks = tl.cdiv(width, BD)
    row = (tl.program_id(0) // blocks) * R + tl.arange(0, R)
    dim = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    inside = (row[:, None] < n_rows) & (dim[None, :] < width)
    offset = row.to(tl.int64)[:, None] * width + dim[None, :]
    bias = tl.load(bias_ptr + dim, mask=dim < width, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(out_ptr + offset, x * _cdf(x), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def bias_gelu_grads(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    sums_ptr,
    n_rows,
    width,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """Store the gradient of x for ROWS rows and BD columns, and its sum over these rows in ``sums`` (programs, width)."""
    blocks = tl.cdiv(width, BD)
    part = tl.program_id(0) // blocks
    dim = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    bias = tl.load(bias_ptr + dim, mask=dim < width, other=0.0).to(tl.float32)
    total = tl.zeros((R, BD), dtype=tl.float32)
    for start in range(part * ROWS, tl.minimum((part + 1) * ROWS, n_rows), R):
        row = start + tl.arange(0, R)
        inside = (row[:, None] < n_rows) & (dim[None, :] < width)
        offset = row.to(tl.int64)[:, None] * width + dim[None, :]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        g = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32) * (_cdf(x) + x * density)
        tl.store(dx_ptr + offset, g, mask=inside)
        total += g
    tl.store(sums_ptr + part * width + dim, tl.sum(total, axis=0), mask=dim < width)
