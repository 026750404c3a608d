"""Packed attention that adds the bias of q, k and v, within sentences or images, as PyTorch operators with gradients.

Images of equal numbers of tokens need no index of their first tokens. Gradients are those of ``torch.autograd.Function``, which takes
the host less time than a registered gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels import flops
from comtip_kernels.packed_attention import BIASED_MODES
from comtip_kernels.packed_attention import triton_kernels as kernels
from comtip_kernels.packed_attention.reference import with_bias
from comtip_kernels.packed_attention.triton_op import launch_options
from comtip_kernels.tl_common import INTERPRETING, input_precision, launch, operand_dtype, power_of_2, product_mode

Maybe = Tensor | None
Launch = tuple[slice, int, int, dict[str, Any]]
"""Rows, window, number of tiles and options of a launch."""


def parts_of(rows: int, tokens: Sequence[int]) -> Iterator[tuple[slice, int, int]]:
    """Yield the rows of each part, its number of images, and the tokens of one of them."""
    images, start = rows // max(1, sum(tokens)), 0
    for T in tokens:
        yield slice(start, start + images * T), images, T
        start += images * T


def _launches(qkv: Tensor, first_S: Maybe, tokens: Sequence[int], *, backward: bool) -> Iterator[Launch]:
    """Yield the launches for sentences of up to ``tokens[0]`` tokens or, without ``first_S``, for each part of images."""
    N, _, H, E = qkv.shape
    if first_S is not None:
        window, (programs,), options = launch_options(qkv.select(1, 0), tokens[0], backward=backward)
        if N:
            yield slice(0, N), window, programs // H, options | {"EQUAL": False}
        return
    mode = product_mode(qkv.dtype)
    for rows, images, T in parts_of(N, tokens):
        BT = flops.image_tile(T, kernels.tiles_of(mode))
        sizes = {"EQUAL": True, "BT": BT, "BE": power_of_2(E)}
        options = sizes | {"UPCAST": INTERPRETING, "PRECISION": input_precision(mode)}
        if images:
            yield rows, T, images, options | kernels.config(mode, BT, backward=backward)


@torch.library.custom_op("comtip::biased_attention", mutates_args=())
def attend(qkv: Tensor, bias: Maybe, first_S: Maybe, tokens: Sequence[int]) -> Tensor:
    """Return (N, H, E) from (N, 3, H, E) plus a bias (3 H E).

    With ``first_S``, the first token of each token's sentence, rows are sentences of up to ``tokens[0]`` tokens. Without it, they are
    images of ``tokens[0]`` rows each, then as many of ``tokens[1]``, and so on.
    """
    N, _, H, E = qkv.shape
    out = torch.empty(N, H, E, device=qkv.device, dtype=qkv.dtype)
    for rows, window, tiles, options in _launches(qkv, first_S, tokens, backward=False):
        q, k, v = qkv[rows].unbind(1)
        strides = (*q.stride(), *k.stride(), *v.stride())
        tensors = (q, k, v, q if bias is None else bias, q if first_S is None else first_S, out[rows])
        sizes = (rows.stop - rows.start, H, E, window, E**-0.5)
        launch(kernels.attention_forward, (tiles * H,), *tensors, *sizes, *strides, BIAS=bias is not None, **options)
    return out


@torch.library.custom_op("comtip::biased_attention_grads", mutates_args=())
def attend_grads(
    qkv: Tensor, bias: Maybe, grad: Tensor, first_S: Maybe, tokens: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``qkv``, and that of ``bias`` in fp32, which is empty without a bias."""
    H, E = qkv.shape[2:]
    out = torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype)
    found = list(_launches(qkv, first_S, tokens, backward=True))
    ends = [sum(tiles for _, _, tiles, _ in found[: i + 1]) for i in range(len(found))]
    sums = torch.empty((ends[-1] if found else 0) * (bias is not None), 3 * H * E, device=qkv.device)
    for (rows, window, tiles, options), end in zip(found, ends, strict=True):
        (q, k, v), g, results = qkv[rows].unbind(1), grad[rows], out[rows].unbind(1)
        strides = (*q.stride(), *k.stride(), *v.stride(), *g.stride())
        tensors = (q, k, v, g, q if bias is None else bias, q if first_S is None else first_S, *results)
        of_tiles = q if bias is None else sums[end - tiles : end]
        sizes = (rows.stop - rows.start, H, E, window, E**-0.5)
        constants = {"PARTS": 3, "BIAS": bias is not None}
        launch(kernels.attention_grads, (tiles * H,), *tensors, of_tiles, *sizes, *strides, **constants, **options)
    return out, sums.new_empty(0) if bias is None else sums.sum(0)


attend.register_fake(lambda qkv, bias, first_S, tokens: qkv.new_empty((qkv.shape[0], *qkv.shape[2:])))


@attend_grads.register_fake
def _(qkv: Tensor, bias: Maybe, grad: Tensor, first_S: Maybe, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    numbers = 0 if bias is None else bias.shape[0]
    return qkv.new_empty(qkv.shape), qkv.new_empty(numbers, dtype=torch.float32)


def _flops(shape: Sequence[int], first: Any, tokens: Sequence[int], *, backward: bool) -> int:
    N, _, H, E = shape
    if first is not None:
        found = [flops.packed_attention(N, H, E, tokens[0])]
    else:
        found = [flops.image_attention(images, H, E, T) for _, images, T in parts_of(N, tokens)]
    return int(sum(f.backward if backward else f.forward for f in found))


register_flop_formula(torch.ops.comtip.biased_attention)(lambda qkv, b, f, n, **_k: _flops(qkv, f, n, backward=False))
register_flop_formula(torch.ops.comtip.biased_attention_grads)(
    lambda qkv, b, g, f, n, **_k: _flops(qkv, f, n, backward=True)
)


class _Attention(torch.autograd.Function):
    """Gradients of attention, which store q, k and v without their bias, and the bias."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Maybe, first_S: Maybe, tokens: Sequence[int]) -> Tensor:
        ctx.save_for_backward(qkv, bias, first_S)
        ctx.tokens = tokens
        return attend(qkv, bias, first_S, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, first_S = ctx.saved_tensors
        dqkv, dbias = attend_grads(qkv, bias, grad.to(qkv.dtype), first_S, ctx.tokens)
        return dqkv, None if bias is None else dbias, None, None


def _attention(qkv: Tensor, bias: Maybe, first_S: Maybe, tokens: list[int]) -> Tensor:
    qkv = qkv.to(operand_dtype(qkv))
    if product_mode(qkv.dtype) not in BIASED_MODES:
        qkv, bias = with_bias(qkv, bias), None
    out: Tensor = _Attention.apply(qkv, None if bias is None else bias.contiguous(), first_S, tokens)
    return out


def sentence_attention_triton(qkv_S3HE: Tensor, bias_C: Tensor, longest: int, first_S: Tensor) -> Tensor:
    """Return (S, H, E) in the operand dtype; see :func:`comtip_kernels.packed_attention_qkv` with a bias."""
    return _attention(qkv_S3HE, bias_C, first_S, [longest])


def image_attention_triton(qkv_N3HE: Tensor, tokens: Sequence[int], bias_C: Tensor | None = None) -> Tensor:
    """Return (N, H, E) in the operand dtype; see :func:`comtip_kernels.image_attention`."""
    return _attention(qkv_N3HE, bias_C, None, list(tokens))
