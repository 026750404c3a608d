"""Losses of the baselines that learn expression directly: regression, and the contrastive loss of BLEEP."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_mse(predicted_BG: Tensor, target_BG: Tensor, known_BG: Tensor) -> Tensor:
    """Return the mean squared error over the known entries; 0, with a gradient of 0, if there are none.

    Parameters
    ----------
    predicted_BG, target_BG
        Expression (B, G) of G genes in B spots, in the same unit.
    known_BG
        bool (B, G): whether the spot's section measured the gene.
    """
    wide = torch.promote_types(predicted_BG.dtype, torch.float32)
    known = known_BG.to(wide)
    squared_BG = (predicted_BG.to(wide) - target_BG.to(wide)) ** 2
    return (squared_BG * known).sum() / known.sum().clamp_min(1.0)


def soft_contrastive(image_BD: Tensor, other_BD: Tensor) -> Tensor:
    """Return BLEEP's contrastive loss, a scalar: cross-entropy in both directions against soft targets.

    The targets are the softmax of the mean of two similarity matrices, one within each modality. The temperature is 1.

    Parameters
    ----------
    image_BD, other_BD
        Vectors (B, D) of B pairs, not normalised.
    """
    logits = other_BD @ image_BD.T
    targets = ((image_BD @ image_BD.T + other_BD @ other_BD.T) / 2).softmax(-1)
    of_others = F.cross_entropy(logits, targets)
    return (of_others + F.cross_entropy(logits.T, targets.T)) / 2
