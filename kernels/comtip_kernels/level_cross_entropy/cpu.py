"""L_level on a CPU, a few genes at a time: the (B, G, Q) scores are never all there, forward or backward.

With p = softmax over q and c the number of measured (spot, gene), d loss / d s[b, g, q] = (p - [q = level]) / c where
measured, 0 elsewhere: the backward makes the scores of a block again and multiplies. What the gene-wise maximum is for a
softmax row of Q numbers is free here, so nothing can overflow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from comtip_kernels.level_cross_entropy.reference import without_own_gene

BLOCK_BYTES = 4 << 20
"""Bytes of one block of scores."""


def _blocks(vectors: Tensor, table: Tensor) -> list[slice]:
    """Return slices of genes whose scores fill about one block."""
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
        for part in _blocks(image, table):
            scores = _scores(image, table, s, prior, part)
            own = scores.gather(2, levels[:, part, None].long()).squeeze(2)
            loss = scores.logsumexp(2).sub_(own)
            total += loss.masked_fill_(~mask[:, part], 0.0).sum()
        ctx.save_for_backward(image, table, levels, mask, *(() if prior is None else (prior,)))
        ctx.scale, ctx.count = s, count
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, table, levels, mask, *rest = ctx.saved_tensors
        prior = rest[0] if rest else None
        dimage, dtable = torch.zeros_like(image), torch.empty_like(table)
        dprior = None if prior is None or not ctx.needs_input_grad[5] else torch.empty_like(prior)
        factor = grads[0] / ctx.count
        for part in _blocks(image, table):
            scores = _scores(image, table, ctx.scale, prior, part)
            g = torch.softmax(scores, 2)
            index = levels[:, part, None].long()
            g.scatter_(2, index, g.gather(2, index).sub_(1.0))
            g.mul_((mask[:, part, None] * factor).to(g.dtype))
            if dprior is not None:
                dprior[part] = g.sum(0)
            rows = table[part]
            flat = g.flatten(1)
            dimage.addmm_(flat, rows.reshape(-1, rows.shape[-1]))
            dtable[part] = (flat.T @ image).view_as(rows)
        # Scores are linear in the image's vector, so the scale's gradient needs no pass of its own.
        dscale = (image * dimage).sum()
        return dimage.mul_(ctx.scale), dtable.mul_(ctx.scale), None, None, dscale, dprior


def level_cross_entropy_cpu(
    image_BD: Tensor,
    table_GQD: Tensor,
    levels_BG: Tensor,
    mask_BG: Tensor,
    scale: Tensor,
    log_prior_GQ: Tensor | None = None,
) -> Tensor:
    """Return L_level, a scalar; see :mod:`comtip_kernels.level_cross_entropy.reference`."""
    return _LevelCrossEntropy.apply(image_BD, table_GQD, levels_BG, mask_BG, scale, log_prior_GQ)


def pair_scores_cpu(
    context_BD: Tensor, table_GQD: Tensor, levels_BG: Tensor, *, true_levels_BG: Tensor | None = None,
    projected_GQD: Tensor | None = None, weight_BG: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the pair head's logits (B, G); see :mod:`comtip_kernels.level_cross_entropy.reference`."""
    score_BG = _TakenScores.apply(context_BD, table_GQD, levels_BG)
    return without_own_gene(score_BG, table_GQD, levels_BG, true_levels_BG, projected_GQD, weight_BG)


class _TakenScores(torch.autograd.Function):
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
