"""The three products as PyTorch operators, each the gradient of another, and L_level on top of them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from comtip_kernels.sentence_table import triton_kernels as kernels
from comtip_kernels.tl_common import INTERPRETING, fitted, power_of_2, precision

_SMALL = {"BM": 16, "BN": 32, "BK": 32}
MAX_LEVELS = 256
"""A tile holds every level of a gene."""


def _tiles(config: dict[str, Any], x: Tensor, Q: int, D: int) -> dict[str, Any]:
    """Return tiles for vectors like ``x`` and Q levels; many levels take their room from the width of the output."""
    if Q > MAX_LEVELS:
        raise ValueError(f"the table has {Q} levels; the Triton kernels take at most {MAX_LEVELS}: impl='reference'")
    fp32 = kernels.FP32 if x.dtype == torch.float32 and "BD" in config else {}
    tiles = fitted(config | fp32, D, _SMALL)
    QP = power_of_2(Q, 2)
    genes = max(1, int(tiles.pop("BN")) // QP)
    out = tiles | {"QP": QP, "NG": max(genes, 16 // QP)}
    if "BD" in out:
        crowded = max(1, out["NG"] * QP // 64)
        out["BD"] = max(16, min(int(out["BD"]) // crowded, power_of_2(D)))
    return out


def _flags(x: Tensor, mode: int, prior: Tensor | None) -> dict[str, Any]:
    return {"MODE": mode, "PRIOR": prior is not None, "UPCAST": INTERPRETING, "PRECISION": precision(x)}


@torch.library.custom_op("comtip::table_take", mutates_args=())
def table_take(vector: Tensor, table: Tensor, levels: Tensor) -> Tensor:
    """Return <vector[b], table[g, levels[b, g]]>, fp32 (B, G)."""
    (B, D), (G, Q, _) = vector.shape, table.shape
    out = torch.empty(B, G, device=vector.device, dtype=torch.float32)
    if out.numel():
        tiles = _tiles(kernels.TAKE, vector, Q, D)
        n_m, n_g = triton.cdiv(B, tiles["BM"]), triton.cdiv(G, tiles["NG"])
        kernels.take_tiles[(n_m * n_g,)](
            vector, table, levels, levels.contiguous(), vector, vector, out, B, G, Q, D, *vector.stride(), *table.stride(), n_g,
            **_flags(vector, kernels.PICK, None), **tiles,
        )  # fmt: skip
    return out


@torch.library.custom_op("comtip::table_spread", mutates_args=())
def table_spread(weight: Tensor, table: Tensor, levels: Tensor) -> Tensor:
    """Return sum_g weight[b, g] table[g, levels[b, g]], fp32 (B, D)."""
    B, (G, Q, D) = weight.shape[0], table.shape
    out = torch.empty(B, D, device=weight.device, dtype=torch.float32)
    if out.numel():
        tiles = _tiles(kernels.SPREAD, table, Q, D)
        kernels.spread_rows[(triton.cdiv(B, tiles["BM"]), triton.cdiv(D, tiles["BD"]))](
            table, table, weight.contiguous(), levels.contiguous(), table, table, table, out, B, G, Q, D, 0, 0, *table.stride(),
            **_flags(table, kernels.PICK, None), **tiles,
        )  # fmt: skip
    return out


@torch.library.custom_op("comtip::table_collect", mutates_args=())
def table_collect(vector: Tensor, weight: Tensor, levels: Tensor, Q: int) -> Tensor:
    """Return sum_b weight[b, g] [levels[b, g] = q] vector[b], fp32 (G, Q, D)."""
    (B, D), G = vector.shape, weight.shape[1]
    out = torch.empty(G, Q, D, device=vector.device, dtype=torch.float32)
    if out.numel():
        tiles = _tiles(kernels.COLLECT, vector, Q, D)
        kernels.collect_rows[(triton.cdiv(G, tiles["NG"]), triton.cdiv(D, tiles["BD"]))](
            vector, vector, weight.contiguous(), levels.contiguous(), vector, vector, vector, out, out, B, G, Q, D,
            *vector.stride(), 0, 0, 0, **_flags(vector, kernels.PICK, None), **tiles,
        )  # fmt: skip
    return out


@torch.library.custom_op("comtip::level_loss", mutates_args=())
def level_loss(
    image: Tensor, table: Tensor, levels: Tensor, weight: Tensor, scale: Tensor, prior: Tensor | None
) -> Tensor:
    """Return sum_bg weight[b, g] (logsumexp_q s[b, g, q] - s[b, g, level]), fp32 scalar."""
    (B, D), (G, Q, _) = image.shape, table.shape
    tiles = _tiles(kernels.TAKE, image, Q, D)
    n_m, n_g = triton.cdiv(B, tiles["BM"]), triton.cdiv(G, tiles["NG"])
    parts = torch.empty(n_m * n_g, device=image.device, dtype=torch.float32)
    if parts.numel():
        kernels.take_tiles[(n_m * n_g,)](
            image, table, weight.contiguous(), levels.contiguous(), image if prior is None else prior, scale, parts, B, G, Q, D, *image.stride(),
            *table.stride(), n_g, **_flags(image, kernels.CROSS_ENTROPY, prior), **tiles,
        )  # fmt: skip
    return parts.sum()


@torch.library.custom_op("comtip::level_loss_grads", mutates_args=())
def level_loss_grads(
    image: Tensor, table: Tensor, levels: Tensor, weight: Tensor, scale: Tensor, prior: Tensor | None, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by scale * image (B, D), scale * table (G, Q, D) and prior (G, Q), fp32, times ``factor``."""
    (B, D), (G, Q, _) = image.shape, table.shape
    # Through torch.empty, which the tests poison.
    dimage, dtable, dprior = (
        torch.empty(shape, device=image.device, dtype=torch.float32)
        for shape in ((B, D), (G, Q, D), (G, Q) if prior is not None else (0,))
    )
    flags, some = _flags(image, kernels.CROSS_ENTROPY, prior), image if prior is None else prior
    weight, levels = weight.contiguous(), levels.contiguous()
    sizes = (B, G, Q, D, *image.stride(), *table.stride())
    if dimage.numel():
        tiles = _tiles(kernels.SPREAD, image, Q, D)
        kernels.spread_rows[(triton.cdiv(B, tiles["BM"]), triton.cdiv(D, tiles["BD"]))](
            image, table, weight, levels, some, scale, factor, dimage, *sizes, **flags, **tiles
        )
    if dtable.numel():
        tiles = _tiles(kernels.COLLECT, image, Q, D)
        kernels.collect_rows[(triton.cdiv(G, tiles["NG"]), triton.cdiv(D, tiles["BD"]))](
            image, table, weight, levels, some, scale, factor, dtable, dprior, *sizes, **flags, **tiles
        )
    return dimage, dtable, dprior


def _float(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


table_take.register_fake(lambda vector, table, levels: _float(vector, vector.shape[0], table.shape[0]))
table_spread.register_fake(lambda weight, table, levels: _float(weight, weight.shape[0], table.shape[2]))
table_collect.register_fake(lambda vector, weight, levels, Q: _float(vector, weight.shape[1], Q, vector.shape[1]))
level_loss.register_fake(lambda image, *rest: _float(image))


@level_loss_grads.register_fake
def _(
    image: Tensor, table: Tensor, levels: Tensor, weight: Tensor, scale: Tensor, prior: Tensor | None, factor: Tensor
) -> Any:
    small = (0,) if prior is None else tuple(prior.shape)
    return _float(image, *image.shape), _float(image, *table.shape), _float(image, *small)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _take_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    vector, table, levels = ctx.saved_tensors
    dvector = table_spread(grad, table, levels).to(vector.dtype)
    return dvector, table_collect(vector, grad, levels, table.shape[1]).to(table.dtype), None


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    weight, table, levels = ctx.saved_tensors
    grad = grad.to(table.dtype)
    dweight = table_take(grad, table, levels).to(weight.dtype)
    return dweight, table_collect(grad, weight, levels, table.shape[1]).to(table.dtype), None


def _collect_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    vector, weight, levels = ctx.saved_tensors
    grad = grad.to(vector.dtype)
    return (
        table_spread(weight, grad, levels).to(vector.dtype),
        table_take(vector, grad, levels).to(weight.dtype),
        None,
        None,
    )


def _keep_level(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _level_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    image, table, levels, weight, scale, prior = ctx.saved_tensors
    dimage, dtable, dprior = level_loss_grads(image, table, levels, weight, scale, prior, grad.float())
    # Scores are linear in the image's vector, so the scale's gradient needs no pass of its own.
    dscale = (image.float() * dimage).sum().to(scale.dtype)
    dimage, dtable = (dimage * scale).to(image.dtype), (dtable * scale).to(table.dtype)
    return dimage, dtable, None, None, dscale, None if prior is None else dprior.to(prior.dtype)


table_take.register_autograd(_take_backward, setup_context=_keep)
table_spread.register_autograd(_spread_backward, setup_context=_keep)
table_collect.register_autograd(_collect_backward, setup_context=_keep)
level_loss.register_autograd(_level_backward, setup_context=_keep_level)


def _product(B: int, table: Any) -> int:
    """Return the FLOPs of B spots against every row."""
    return int(2 * B * table[0] * table[1] * table[2])


def _grads(image: Any, table: Any, *_args: Any, **_kwargs: Any) -> int:
    """Two products, and the scores again for each of them and each slice of the width."""
    slices = triton.cdiv(table[2], kernels.SPREAD["BD"])
    return (2 + 2 * slices) * _product(image[0], table)


register_flop_formula(torch.ops.comtip.table_take)(lambda v, t, *_a, **_k: _product(v[0], t))
register_flop_formula(torch.ops.comtip.table_spread)(lambda w, t, *_a, **_k: _product(w[0], t))
register_flop_formula(torch.ops.comtip.table_collect)(lambda v, w, _l, Q, **_k: _product(v[0], (w[1], Q, v[1])))
register_flop_formula(torch.ops.comtip.level_loss)(lambda i, t, *_a, **_k: _product(i[0], t))
register_flop_formula(torch.ops.comtip.level_loss_grads)(_grads)
