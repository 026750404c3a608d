"""L_level and the scores of the pair head on a CPU, in blocks of genes: a block of scores has at most 4 MiB, or one gene.

With p = softmax over q and c the number of measured (spot, gene) pairs, d loss / d s[b, g, q] = (p - [q = level]) / c where
measured, and 0 elsewhere. The loss is a scalar, so its gradients are known up to a factor as soon as the softmax of a block is:
the forward pass computes them too, and neither the scores nor their exponentials are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from comtip_kernels.level_cross_entropy.reference import without_own_gene

BLOCK_BYTES = 4 << 20
"""Maximum bytes of one block of scores, which only a block of one gene may exceed."""


def _blocks(vectors: Tensor, table: Tensor) -> list[slice]:
    """Return consecutive slices of the genes, each as long as one block of scores allows."""
    G, Q = table.shape[:2]
    size = max(1, BLOCK_BYTES // max(1, vectors.shape[0] * Q * vectors.element_size()))
    return [slice(start, min(start + size, G)) for start in range(0, G, size)]


def _scores(image: Tensor, table: Tensor, scale: float, prior: Tensor | None, part: slice) -> Tensor:
    """Return s (B, genes of the block, Q)."""
    rows = table[part]
    s = (image @ rows.reshape(-1, rows.shape[-1]).T).mul_(scale).view(image.shape[0], *rows.shape[:2])
    return s if prior is None else s.add_(prior[part])


class _LevelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, table: Tensor, levels: Tensor, mask: Tensor, scale: Tensor, prior: Tensor | None
    ) -> Tensor:
        s = float(scale)
        count = int(mask.sum().clamp_min(1))
        total = image.new_zeros(())
        grads = None
        if any(ctx.needs_input_grad):
            dprior = torch.empty_like(prior) if prior is not None and ctx.needs_input_grad[5] else None
            grads = (torch.zeros_like(image), torch.empty_like(table), dprior)
        for part in _blocks(image, table):
            scores = _scores(image, table, s, prior, part)
            index, inside = levels[:, part, None].long(), mask[:, part, None]
            own = scores.gather(2, index)
            top = scores.amax(2, keepdim=True)
            scores.sub_(top).exp_()
            sums = scores.sum(2, keepdim=True)
            total += (sums.log() + top - own).masked_fill_(~inside, 0.0).sum()
            if grads is not None:
                scores.mul_(inside / (sums * count))
                scores.scatter_add_(2, index, inside.to(scores.dtype) / -count)
                _add_gradients(grads, scores, image, table, part)
        if grads is not None:
            # Scores are linear in the image vector, so the gradient of the scale needs no pass of its own.
            dscale = (image * grads[0]).sum()
            ctx.save_for_backward(grads[0].mul_(s), grads[1].mul_(s), dscale, *(() if grads[2] is None else grads[2:]))
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dimage, dtable, dscale, *rest = (t * grads[0] for t in ctx.saved_tensors)
        return dimage, dtable, None, None, dscale, rest[0] if rest else None


def _add_gradients(
    grads: tuple[Tensor, Tensor, Tensor | None], dscores: Tensor, image: Tensor, table: Tensor, part: slice
) -> None:
    """Add the gradient of the scores of the genes ``part`` to that of image, and write their rows of those of table and prior."""
    dimage, dtable, dprior = grads
    rows, flat = table[part], dscores.flatten(1)
    dimage.addmm_(flat, rows.reshape(-1, rows.shape[-1]))
    dtable[part] = (flat.T @ image).view_as(rows)
    if dprior is not None:
        dprior[part] = dscores.sum(0)


def level_cross_entropy_cpu(
    image_BD: Tensor,
    table_GQD: Tensor,
    levels_BG: Tensor,
    mask_BG: Tensor,
    scale: Tensor,
    log_prior_GQ: Tensor | None = None,
) -> Tensor:
    """Return L_level, a scalar; see :mod:`comtip_kernels.level_cross_entropy.reference`."""
    dtype = torch.promote_types(image_BD.dtype, table_GQD.dtype)
    return _LevelCrossEntropy.apply(image_BD.to(dtype), table_GQD.to(dtype), levels_BG, mask_BG, scale, log_prior_GQ)


def pair_scores_cpu(
    context_BD: Tensor,
    table_GQD: Tensor,
    levels_BG: Tensor,
    *,
    true_levels_BG: Tensor | None = None,
    projected_GQD: Tensor | None = None,
    weight_BG: Tensor | None = None,
) -> Tensor:
    """Return the logits of the pair head (B, G); see :mod:`comtip_kernels.level_cross_entropy.reference`."""
    dtype = torch.promote_types(context_BD.dtype, table_GQD.dtype)
    score_BG = _SampledDot.apply(context_BD.to(dtype), table_GQD.to(dtype), levels_BG)
    return without_own_gene(score_BG, table_GQD, levels_BG, true_levels_BG, projected_GQD, weight_BG)


class _SampledDot(torch.autograd.Function):
    """<c_b, table[g, levels[b, g]]> for every (b, g), a block of genes at a time."""

    @staticmethod
    def forward(ctx: Any, context: Tensor, table: Tensor, levels: Tensor) -> Tensor:
        out = context.new_empty(levels.shape)
        for part in _blocks(context, table):
            scores = _scores(context, table, 1.0, None, part)
            out[:, part] = scores.gather(2, levels[:, part, None].long()).squeeze(2)
        ctx.save_for_backward(context, table, levels)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        context, table, levels = ctx.saved_tensors
        dcontext, dtable = torch.zeros_like(context), torch.empty_like(table)
        for part in _blocks(context, table):
            rows = table[part]
            g = context.new_zeros(context.shape[0], *rows.shape[:2])
            g.scatter_(2, levels[:, part, None].long(), grads[0][:, part, None].contiguous())
            flat = g.flatten(1)
            dcontext.addmm_(flat, rows.reshape(-1, rows.shape[-1]))
            dtable[part] = (flat.T @ context).view_as(rows)
        return dcontext, dtable, None
