"""L_level and L_pair scores over the sentence table."""

from __future__ import annotations

from torch import Tensor

from comtip_kernels.dispatch import Impl, choose, with_triton
from comtip_kernels.level_cross_entropy.cpu import level_cross_entropy_cpu, pair_scores_cpu
from comtip_kernels.level_cross_entropy.reference import (
    level_cross_entropy_reference,
    level_scores,
    pair_scores_reference,
    take_level,
)

__all__ = [
    "level_cross_entropy",
    "level_cross_entropy_reference",
    "level_scores",
    "pair_scores",
    "pair_scores_reference",
    "take_level",
]
_HAVE = {
    "reference": level_cross_entropy_reference,
    "cpu": level_cross_entropy_cpu,
    "triton": with_triton("comtip_kernels.level_cross_entropy.gpu", "level_cross_entropy_triton"),
}
_HAVE_PAIR = {
    "reference": pair_scores_reference,
    "cpu": pair_scores_cpu,
    "triton": with_triton("comtip_kernels.level_cross_entropy.gpu", "pair_scores_triton"),
}


def level_cross_entropy(
    image_BD: Tensor,
    table_GQD: Tensor,
    levels_BG: Tensor,
    mask_BG: Tensor,
    scale: Tensor,
    log_prior_GQ: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Cross-entropy of each measured (spot, gene) over the Q levels of that gene.

    Parameters
    ----------
    image_BD, table_GQD
        Unit vectors.
    levels_BG, mask_BG
        Measured levels (integers) and where they were measured.
    scale
        Inverse temperature of this loss, a scalar tensor.
    log_prior_GQ
        Log frequency of each gene's levels (logit adjustment); added to the scores.
    impl
        Which implementation; see :mod:`comtip_kernels.dispatch`.

    Returns
    -------
    Tensor
        Mean over the measured (spot, gene), in nats; 0 when there are none.
    """
    return choose("level_cross_entropy", impl, image_BD, _HAVE)(
        image_BD, table_GQD, levels_BG, mask_BG, scale, log_prior_GQ
    )


def pair_scores(
    context_BD: Tensor,
    table_GQD: Tensor,
    levels_BG: Tensor,
    *,
    true_levels_BG: Tensor | None = None,
    projected_GQD: Tensor | None = None,
    weight_BG: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Pair-head logits of the sentences (g, levels[b, g]); see :func:`pair_scores_reference`."""
    return choose("pair_scores", impl, context_BD, _HAVE_PAIR)(
        context_BD, table_GQD, levels_BG, true_levels_BG=true_levels_BG, projected_GQD=projected_GQD,
        weight_BG=weight_BG,
    )  # fmt: skip
