"""Costs of fused transformer blocks (``engine.fused_blocks``): what the kernels between the products read and write.

A block takes a stream and a branch that is not added yet, and returns both (:mod:`comtip_fast.models.fused_blocks`). Shapes: n rows of
width d, from which an MLP computes ``hidden`` elements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from comtip_kernels import flops
from comtip_kernels.packed_attention import IMAGE_TOKENS
from comtip_kernels.tiles import POINTWISE_ROWS

from comtip_fast.plan.cost import STATISTIC, Cost, Precision, attention, cast, checkpointed, linear, norm


def summed_norm(n: float, d: int, p: Precision) -> Cost:
    """Return the cost of adding a branch to the stream, and of the norm of the sum (``comtip_kernels.residual_norm``).

    Forward, stream and branch are read, sum and norm written. Backward, the gradients of sum and norm and the sum are read, and the gradient
    is written in the dtypes of both. Sums for gain, bias and the branch's bias are written per group of rows, and added.
    """
    row, sums = n * d, 2 * 3 * ceil(n / POINTWISE_ROWS) * d * STATISTIC
    forward = row * (2 * p.stream + 2 * p.operand)
    back = row * (3 * p.stream + p.operand * (2 if p.casts else 1)) + sums
    return Cost("sum and norm", moved=forward, back_moved=back, saved=row * p.stream + 2 * n * STATISTIC)


def bias_gelu(n: float, hidden: int, p: Precision) -> Cost:
    """Return the cost of adding a bias and applying GELU, whose backward pass also sums the gradient of the bias."""
    tensor, sums = n * hidden * p.operand, 2 * ceil(n / POINTWISE_ROWS) * hidden * STATISTIC
    return Cost("gelu", moved=2 * tensor, back_moved=3 * tensor + sums, saved=tensor)


def whole(n: float, d: int, p: Precision) -> list[Cost]:
    """Return the costs of adding a branch and its bias to the stream with operators of PyTorch.

    The gradient of the branch is a cast of the stream's, from which the bias' is summed.
    """
    row = n * d
    forward = row * (p.operand + p.stream) + 3 * row * p.stream
    return [Cost("add branch", moved=forward, back_moved=row * p.stream), cast(n, d, p, backward_only=True)]


def start(n: float, d: int, p: Precision, *, branch: bool, used_again: bool = True) -> list[Cost]:
    """Return the costs of the first norm of a block: that of PyTorch, or with a ``branch`` to add, the sum and its norm.

    PyTorch's norm leaves it to autograd to add the gradients of the stream, which is ``used_again`` for the residual sum.
    """
    if branch:
        return [summed_norm(n, d, p)]
    added = Cost("add gradients", back_moved=3 * n * d * p.stream) if used_again else None
    return [norm(n, d, p), cast(n, d, p), *([added] if added else [])]


def after_attention(n: float, d: int, hidden: int, p: Precision, *, weights: bool = True) -> list[Cost]:
    """Return the costs of a block after its attention. Kernels between the products sum the gradients of the biases."""
    return [
        linear(n, d, d, p, bias=False, weights=weights),
        summed_norm(n, d, p),
        linear(n, d, hidden, p, bias=False, weights=weights),
        bias_gelu(n, hidden, p),
        linear(n, hidden, d, p, bias=False, weights=weights),
    ]


def packs_images(p: Precision, longest: int) -> bool:
    """Return whether the packed kernel computes attention within images of up to ``longest`` tokens, and adds the bias of q, k and v."""
    return longest <= IMAGE_TOKENS["bf16" if p.is_bf16 else "tf32x3"]


def bias_sums(cost: Cost, tiles: float, d: int) -> Cost:
    """Return the cost of attention whose kernel also writes sums of the gradients of q, k and v per tile, which are then added."""
    return replace(cost, back_moved=cost.back_moved + 2 * 3 * tiles * d * STATISTIC)


def image_attention(images: float, tokens: int, d: int, heads: int, p: Precision) -> Cost:
    """Return the cost of attention within images by the packed kernel, one image per tile; it stores q, k and v alone."""
    issued = flops.image_attention(images, heads, d // heads, tokens)
    row = images * tokens * d * p.operand
    cost = Cost("attention", issued.forward, issued.backward, 4 * row, 7 * row, 3 * row)
    return bias_sums(cost, images, d)


def image_block(
    images: float,
    tokens: int,
    d: int,
    hidden: int,
    heads: int,
    p: Precision,
    *,
    packed: bool,
    weights: bool,
    branch: bool,
) -> list[Cost]:
    """Return the costs of a block of the image encoder for one part of the rows.

    ``packed`` is :func:`packs_images` for the largest part, ``branch`` as in :func:`start`.
    """
    n = images * tokens
    within = image_attention(images, tokens, d, heads, p) if packed else attention(n, tokens, d, heads, p)
    # PyTorch's attention stacks the gradients of q, k and v, and the results of several parts are concatenated.
    stack = [] if packed else [Cost("stack gradients", moved=2 * n * d * p.operand, back_moved=12 * n * d * p.operand)]
    return [
        *start(n, d, p, branch=branch),
        linear(n, d, 3 * d, p, bias=not packed, weights=weights),
        within,
        *stack,
        *after_attention(n, d, hidden, p, weights=weights),
    ]


@dataclass(frozen=True, kw_only=True)
class ImageBlocks:
    """Blocks of an image encoder."""

    depth: int
    d: int
    hidden: int
    heads: int

    def costs(
        self,
        images: float,
        tokens: int,
        p: Precision,
        *,
        packed: bool = True,
        weights: bool = True,
        checkpointing: bool = False,
    ) -> list[Cost]:
        """Return the costs of all fused blocks for images of ``tokens`` tokens, and of adding the last branch.

        With activation checkpointing, the branch of every block is added after it, and only the sum is stored.
        """
        n, sizes = images * tokens, (self.d, self.hidden, self.heads, p)
        first = image_block(images, tokens, *sizes, packed=packed, weights=weights, branch=False)
        add = whole(n, self.d, p)
        if checkpointing:
            return self.depth * [*checkpointed(first, n * self.d * p.stream, "block input"), *add]
        return [
            *first,
            *((self.depth - 1) * image_block(images, tokens, *sizes, packed=packed, weights=weights, branch=True)),
            *add,
        ]
