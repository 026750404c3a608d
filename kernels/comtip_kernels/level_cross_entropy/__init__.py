"""Cross-entropy over expression levels (L_level), and scores of the pair head, from the sentence table."""

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
_LEVEL = {
    "reference": level_cross_entropy_reference,
    "cpu": level_cross_entropy_cpu,
    "triton": with_triton("comtip_kernels.level_cross_entropy.triton_op", "level_cross_entropy_triton"),
}
_PAIR = {
    "reference": pair_scores_reference,
    "cpu": pair_scores_cpu,
    "triton": with_triton("comtip_kernels.level_cross_entropy.triton_op", "pair_scores_triton"),
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
    """Return the mean cross-entropy of the measured (spot, gene) pairs over the Q levels of each gene.

    The formula is in :mod:`comtip_kernels.level_cross_entropy.reference`.

    Parameters
    ----------
    image_BD, table_GQD
        Unit vectors, floating point. The Triton kernels multiply in bf16 if either is bf16 or bf16 autocast is enabled.
    levels_BG, mask_BG
        Measured levels (integers 0..Q-1) and where they were measured (bool).
    scale
        Inverse temperature of this loss, a scalar tensor; it is moved to the device of the vectors.
    log_prior_GQ
        Log frequency of the levels of each gene, added to the scores (logit adjustment, Menon et al. 2021).
    impl
        Implementation; see :mod:`comtip_kernels.dispatch`.

    Returns
    -------
    Tensor
        Scalar, in nats, fp32 on Triton kernels; 0 if nothing is measured.

    Raises
    ------
    ValueError
        If ``impl`` does not support the operands, or there are more than 256 levels for the Triton kernels.
    """
    out: Tensor = choose("level_cross_entropy", impl, (image_BD, table_GQD), _LEVEL)(
        image_BD, table_GQD, levels_BG, mask_BG, scale.to(image_BD.device), log_prior_GQ
    )
    return out


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
    """Return the logits of the pair head for the sentences (g, levels[b, g]) in the context of each spot.

    The formula is in :mod:`comtip_kernels.level_cross_entropy.reference`.

    Parameters
    ----------
    context_BD
        Image vector; or pooled text vector t, if the three optional tensors below are given.
    table_GQD
        Sentences multiplied by the bilinear form of the head, (W^T h)(g, q).
    levels_BG
        Level that each sentence claims, integers 0..Q-1.
    true_levels_BG, projected_GQD, weight_BG
        For text context only, all three or none: true levels (B, G), the rows h(g, q) that t was pooled from (G, Q, D), and the
        pooling weights p (B, G); gene g itself is then removed from t.
    impl
        Implementation; see :mod:`comtip_kernels.dispatch`.

    Returns
    -------
    Tensor
        (B, G), in the promoted dtype of the floating-point operands.

    Raises
    ------
    ValueError
        If ``impl`` does not support the operands, or there are more than 256 levels for the Triton kernels.
    """
    out: Tensor = choose("pair_scores", impl, (context_BD, table_GQD), _PAIR)(
        context_BD,
        table_GQD,
        levels_BG,
        true_levels_BG=true_levels_BG,
        projected_GQD=projected_GQD,
        weight_BG=weight_BG,
    )
    return out
