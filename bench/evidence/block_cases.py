"""Cases of the operations between the products of a block, and of attention within images, in the dtypes of training.

The stream and all parameters are fp32, and what products computed is bf16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comtip_kernels import bias_gelu, image_attention, residual_norm
from torch import Tensor

from bench.evidence.cases import Case, Loss, randn


def compiled(device: str, loss: Loss) -> dict[str, Loss]:
    """Return torch.compile's version of a reference, which fuses such operations; none on a CPU, where nothing is timed."""
    return {"torch.compile": torch.compile(loss)} if device == "cuda" else {}


def wide(device: str, *shape: int, seed: int = 0) -> Tensor:
    """Return the numbers of :func:`bench.evidence.cases.randn` in fp32."""
    return randn(device, *shape, seed=seed).detach().float().requires_grad_()


def pointwise_cases(device: str, N: int, d: int) -> list[Case]:
    """Return residual sum with LayerNorm, and bias with GELU of 4 d columns, for N rows of a stream of width d."""
    vectors = [wide(device, d, seed=seed) for seed in range(3)]

    def norm(impl: str) -> Loss:
        return lambda *t: residual_norm(*t, impl=impl)  # type: ignore[arg-type]

    def gelu(impl: str) -> Loss:
        return lambda x, bias: bias_gelu(x, bias, impl=impl)  # type: ignore[arg-type]

    # Bytes per column and row: stream 4, branch 2, sum 4 and norm 2; gradients 2 and 4, stream 4, and the gradient 4 and 2.
    return [
        Case(
            "residual_norm",
            f"N={N} d={d}",
            [wide(device, N, d), randn(device, N, d, seed=1), *vectors],
            norm("triton"),
            norm("reference"),
            0.0,
            28.0 * N * d,
            compiled(device, norm("reference")),
            fp32=(0, 2, 3, 4),
        ),
        Case(
            "bias_gelu",
            f"N={N} d={4 * d}",
            [randn(device, N, 4 * d), wide(device, 4 * d)],
            gelu("triton"),
            gelu("reference"),
            0.0,
            10.0 * N * 4 * d,
            compiled(device, gelu("reference")),
            fp32=(1,),
        ),
    ]


def images_case(device: str, images: int, H: int, E: int, tokens: Sequence[int]) -> Case:
    """Return attention with a bias within images, in parts of ``tokens`` rows per image, with H heads of width E."""

    def call(impl: str) -> Loss:
        return lambda qkv, bias: image_attention(qkv, tokens, bias, impl=impl)  # type: ignore[arg-type]

    N, parts = images * sum(tokens), "+".join(map(str, tokens))
    inputs = [randn(device, N, 3, H, E), wide(device, 3 * H * E)]
    size, moved = f"images={images} tokens={parts} H={H} E={E}", 22.0 * N * H * E
    return Case(
        "image_attention", size, inputs, call("triton"), call("reference"), 0.0, moved, operands=(0,), fp32=(1,)
    )
