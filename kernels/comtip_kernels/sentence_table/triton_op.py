"""The three products of this package, and the loss L_level, as PyTorch operators; the gradients of a product are the other two.

Every operator takes ``bf16``: whether it multiplies in bf16 (:func:`comtip_kernels.tl_common.operand_dtype`). Operands are
rounded inside the operator, so that the gradient of an fp32 table is summed and returned in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels import flops
from comtip_kernels.products import add_product
from comtip_kernels.sentence_table import triton_kernels as kernels
from comtip_kernels.tl_common import INTERPRETING, cdiv, fit_tiles, input_precision, launch, power_of_2, product_mode

SMALL = {"BM": 16, "BN": 32, "BK": 32}
"""Tile sizes in the interpreter."""
MAX_LEVELS = 256
"""Maximum number of levels of a gene: a tile contains all of them."""


def choose_tiles(configs: dict[str, dict[str, Any]], x: Tensor, n_levels: int, width: int) -> dict[str, Any]:
    """Return the tile sizes for operands like ``x``; for some numbers of levels, tiles have fewer spots or a narrower output.

    Raises
    ------
    ValueError
        If there are more than ``MAX_LEVELS`` levels.
    """
    if n_levels > MAX_LEVELS:
        raise ValueError(
            f"sentence table: {n_levels} levels; the Triton kernels support at most {MAX_LEVELS}, use impl='reference'"
        )
    tiles = fit_tiles(configs[product_mode(x.dtype)], width, SMALL)
    QP = power_of_2(n_levels, 2)
    columns = int(tiles.pop("BN"))
    genes = max(1, columns // QP)
    out = tiles | {"QP": QP, "NG": max(genes, 16 // QP)}
    if columns < QP and "BD" not in out:  # one gene is wider than the tile, which spills or exceeds the shared memory
        out["BM"] = max(16, int(out["BM"]) * columns // QP)
    if x.dtype == torch.bfloat16 and kernels.spills(configs, QP, columns):
        out["BM"] = max(16, int(out["BM"]) // 2)
    if "BD" in out:
        out["BD"] = max(16, min(int(out["BD"]) // max(1, out["NG"] * QP // columns), power_of_2(width)))
    return out


def gene_parts(tiles: dict[str, Any], n_spots: int, n_genes: int, width: int) -> tuple[int, int]:
    """Return the number of parts into which ``weighted_sum`` divides the panel, and the genes of a part."""
    blocks = cdiv(n_spots, tiles["BM"]) * cdiv(width, tiles["BD"])
    return flops.panel_parts(blocks, n_genes, tiles["NG"])


def as_bytes(levels: Tensor) -> Tensor:
    """Return levels as uint8, an eighth of the bytes of int64; every tile reads them again."""
    return levels.to(torch.uint8)


def _precision(x: Tensor) -> dict[str, Any]:
    return {"UPCAST": INTERPRETING, "PRECISION": input_precision(product_mode(x.dtype))}


def _constants(x: Tensor, mode: int, prior: Tensor | None) -> dict[str, Any]:
    return {"MODE": mode, "PRIOR": prior is not None} | _precision(x)


def _without_inner(tiles: dict[str, Any]) -> dict[str, Any]:
    """Return tile sizes without the inner dimension of scores, for kernels that compute none."""
    return {name: size for name, size in tiles.items() if name != "BK"}


def _operand(x: Tensor, bf16: bool) -> Tensor:
    return x.to(torch.bfloat16 if bf16 else torch.float32)


@torch.library.custom_op("comtip::sampled_dot", mutates_args=())
def sampled_dot(vector: Tensor, table: Tensor, levels: Tensor, bf16: bool) -> Tensor:
    """Return <vector[b], table[g, levels[b, g]]>, fp32 (B, G)."""
    (B, D), (G, Q, _) = vector.shape, table.shape
    vector, table = _operand(vector, bf16), _operand(table, bf16)
    out = torch.empty(B, G, device=vector.device, dtype=torch.float32)
    if out.numel():
        tiles = choose_tiles(kernels.SAMPLED_DOT, vector, Q, D)
        n_m, n_g = cdiv(B, tiles["BM"]), cdiv(G, tiles["NG"])
        # ``out`` replaces the weight, prior and scale, which this mode does not read.
        tensors = (vector, table, out, levels.contiguous(), out, out, out)
        sizes = (B, G, Q, D, *vector.stride(), *table.stride(), n_m)
        launch(kernels.sampled_dot, (n_m * n_g,), *tensors, *sizes, **_constants(vector, kernels.PICK, None), **tiles)
    return out


@torch.library.custom_op("comtip::weighted_sum", mutates_args=())
def weighted_sum(weight: Tensor, table: Tensor, levels: Tensor, bf16: bool) -> Tensor:
    """Return sum_g weight[b, g] table[g, levels[b, g]], fp32 (B, D)."""
    B, (G, Q, D) = weight.shape[0], table.shape
    table = _operand(table, bf16)
    if not B * D:
        return torch.empty(B, D, device=weight.device, dtype=torch.float32)
    tiles = choose_tiles(kernels.WEIGHTED_SUM, table, Q, D)
    parts, part_genes = gene_parts(tiles, B, G, D)
    out = torch.empty(parts, B, D, device=weight.device, dtype=torch.float32)
    grid = (cdiv(B, tiles["BM"]), cdiv(D, tiles["BD"]), parts)
    tensors = (table, weight.float().contiguous(), levels.contiguous(), out)
    sizes = (B, G, Q, D, *table.stride(), part_genes)
    launch(kernels.weighted_sum, grid, *tensors, *sizes, **_precision(table), **_without_inner(tiles))
    return out.sum(0) if parts > 1 else out.view(B, D)


@torch.library.custom_op("comtip::weighted_sum_transpose", mutates_args=())
def weighted_sum_transpose(vector: Tensor, weight: Tensor, levels: Tensor, n_levels: int, bf16: bool) -> Tensor:
    """Return sum_b weight[b, g] [levels[b, g] = q] vector[b], fp32 (G, Q, D)."""
    (B, D), G = vector.shape, weight.shape[1]
    vector = _operand(vector, bf16)
    out = torch.empty(G, n_levels, D, device=vector.device, dtype=torch.float32)
    if out.numel():
        tiles = choose_tiles(kernels.WEIGHTED_SUM_TRANSPOSE, vector, n_levels, D)
        grid = (cdiv(G, tiles["NG"]), cdiv(D, tiles["BD"]))
        tensors = (vector, weight.float().contiguous(), levels.contiguous(), out)
        sizes = (B, G, n_levels, D, *vector.stride())
        launch(kernels.weighted_sum_transpose, grid, *tensors, *sizes, **_precision(vector), **_without_inner(tiles))
    return out


@torch.library.custom_op("comtip::level_loss", mutates_args=())
def level_loss(
    image: Tensor, table: Tensor, levels: Tensor, weight: Tensor, scale: Tensor, prior: Tensor | None, bf16: bool
) -> Tensor:
    """Return sum_bg weight[b, g] (logsumexp_q s[b, g, q] - s[b, g, level]), fp32 scalar."""
    (B, D), (G, Q, _) = image.shape, table.shape
    image, table = _operand(image, bf16), _operand(table, bf16)
    tiles = choose_tiles(kernels.LEVEL_LOSS, image, Q, D)
    n_m, n_g = cdiv(B, tiles["BM"]), cdiv(G, tiles["NG"])
    parts = torch.empty(n_m * n_g, device=image.device, dtype=torch.float32)
    if parts.numel():
        tensors = (
            image,
            table,
            weight.contiguous(),
            levels.contiguous(),
            scale if prior is None else prior,
            scale,
            parts,
        )
        sizes = (B, G, Q, D, *image.stride(), *table.stride(), n_m)
        constants = _constants(image, kernels.CROSS_ENTROPY, prior)
        launch(kernels.sampled_dot, (n_m * n_g,), *tensors, *sizes, **constants, **tiles)
    return parts.sum()


@torch.library.custom_op("comtip::level_loss_grads", mutates_args=())
def level_loss_grads(
    image: Tensor,
    table: Tensor,
    levels: Tensor,
    weight: Tensor,
    scale: Tensor,
    prior: Tensor | None,
    factor: Tensor,
    bf16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives of ``level_loss`` with respect to scale * image (B, D), scale * table (G, Q, D) and prior (G, Q).

    All are fp32 and multiplied by ``factor``; without a prior, the third tensor is empty.
    """
    image, table = _operand(image, bf16), _operand(table, bf16)
    (B, D), (G, Q, _) = image.shape, table.shape
    # torch.empty, which the tests fill with NaN.
    dtable = torch.empty(G * Q, D, device=image.device, dtype=torch.float32)
    if not image.numel() or not table.numel():
        return torch.zeros_like(image, dtype=torch.float32), dtable.zero_().view(G, Q, D), _no_prior(image, prior)
    dimage = torch.empty(B, D, device=image.device, dtype=torch.float32)
    tiles = choose_tiles(kernels.LEVEL_GRADIENT, image, Q, D)
    n_m = cdiv(B, tiles["BM"])
    sums = torch.empty(n_m if prior is not None else 0, G, Q, device=image.device, dtype=torch.float32)
    n_genes = min(G, flops.level_chunk(B, Q, image.element_size()))
    row_length = flops.padded(n_genes * Q)
    chunk = torch.empty(B, row_length, device=image.device, dtype=image.dtype)
    tensors = (image, table, weight.contiguous(), levels.contiguous(), scale if prior is None else prior, scale, factor)
    constants = {"PRIOR": prior is not None} | _precision(image)
    for first in range(0, G, n_genes):
        last = min(first + n_genes, G)
        n_g = cdiv(last - first, tiles["NG"])
        sizes = (B, last, Q, D, *image.stride(), *table.stride(), first, n_m, row_length)
        launch(kernels.level_gradient, (n_m * n_g,), *tensors, chunk, sums, *sizes, G, **constants, **tiles)
        w = chunk[:, : (last - first) * Q]
        add_product(dimage, w, table[first:last].reshape(-1, D), accumulate=first > 0)
        add_product(dtable[first * Q : last * Q], w.T, image, accumulate=False)
    dprior = _no_prior(image, None) if prior is None else sums.sum(0)
    return dimage, dtable.view(G, Q, D), dprior


def _no_prior(image: Tensor, prior: Tensor | None) -> Tensor:
    """Return the gradient of the prior on an empty batch or panel: zeros, or an empty tensor if there is no prior."""
    return image.new_zeros((0,) if prior is None else prior.shape, dtype=torch.float32)


def _empty(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


sampled_dot.register_fake(lambda vector, table, *_: _empty(vector, vector.shape[0], table.shape[0]))
weighted_sum.register_fake(lambda weight, table, *_: _empty(weight, weight.shape[0], table.shape[2]))
weighted_sum_transpose.register_fake(
    lambda vector, weight, levels, n_levels, bf16: _empty(vector, weight.shape[1], n_levels, vector.shape[1])
)
level_loss.register_fake(lambda image, *_: _empty(image))


@level_loss_grads.register_fake
def _(
    image: Tensor, table: Tensor, levels: Tensor, weight: Tensor, scale: Tensor, prior: Tensor | None, *_: Any
) -> Any:
    dprior = _empty(image, *((0,) if prior is None else prior.shape))
    return _empty(image, *image.shape), _empty(image, *table.shape), dprior


def _setup_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.bf16 = inputs[-1]


def _sampled_dot_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    vector, table, levels = ctx.saved_tensors
    dvector = weighted_sum(grad, table, levels, ctx.bf16)
    dtable = weighted_sum_transpose(vector, grad, levels, table.shape[1], ctx.bf16)
    return dvector.to(vector.dtype), dtable.to(table.dtype), None, None


def _weighted_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, table, levels = ctx.saved_tensors
    dweight = sampled_dot(grad, table, levels, ctx.bf16)
    dtable = weighted_sum_transpose(grad, weight, levels, table.shape[1], ctx.bf16)
    return dweight.to(weight.dtype), dtable.to(table.dtype), None, None


def _weighted_sum_transpose_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    vector, weight, levels = ctx.saved_tensors
    dvector = weighted_sum(weight, grad, levels, ctx.bf16)
    return dvector.to(vector.dtype), sampled_dot(vector, grad, levels, ctx.bf16).to(weight.dtype), None, None, None


def _setup_level(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.bf16 = inputs
    ctx.save_for_backward(*tensors)


def _level_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    image, table, levels, weight, scale, prior = ctx.saved_tensors
    dimage, dtable, dprior = level_loss_grads(image, table, levels, weight, scale, prior, grad.float(), ctx.bf16)
    # Scores are linear in the image vector, so the gradient of the scale needs no pass of its own.
    dscale = (_operand(image, ctx.bf16).float() * dimage).sum().to(scale.dtype)
    dimage, dtable = (dimage * scale).to(image.dtype), (dtable * scale).to(table.dtype)
    return dimage, dtable, None, None, dscale, None if prior is None else dprior.to(prior.dtype), None


sampled_dot.register_autograd(_sampled_dot_backward, setup_context=_setup_product)
weighted_sum.register_autograd(_weighted_sum_backward, setup_context=_setup_product)
weighted_sum_transpose.register_autograd(_weighted_sum_transpose_backward, setup_context=_setup_product)
level_loss.register_autograd(_level_backward, setup_context=_setup_level)


def _level_flops(i: Any, t: Any, *_args: Any, **_kwargs: Any) -> flops.Flops:
    return flops.level_cross_entropy(i[0], *t, gpu=True)


ops = torch.ops.comtip
register_flop_formula(ops.sampled_dot)(lambda v, t, *_a, **_k: int(flops.table_product(v[0], *t)))
register_flop_formula(ops.weighted_sum)(lambda w, t, *_a, **_k: int(flops.table_product(w[0], *t)))
register_flop_formula(ops.weighted_sum_transpose)(
    lambda v, w, _l, Q, *_a, **_k: int(flops.table_product(v[0], w[1], Q, v[1]))
)
register_flop_formula(ops.level_loss)(lambda *a, **_k: int(_level_flops(*a).forward))
register_flop_formula(ops.level_loss_grads)(lambda *a, **_k: int(_level_flops(*a).backward))
