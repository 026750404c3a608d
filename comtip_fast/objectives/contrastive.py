"""Helpers of the alignment loss; the loss itself is :func:`comtip_kernels.infonce`."""

from __future__ import annotations

import torch
from torch import Tensor


def same_text_ids(levels_XG: Tensor, measured_XG: Tensor) -> Tensor:
    """Give equal integers to rows whose measured genes and levels are all equal; (X,) int64.

    Two spots with the same text are not each other's negatives.
    """
    masked = torch.where(measured_XG, levels_XG.long(), torch.full_like(levels_XG, -1, dtype=torch.long))
    return masked.unique(dim=0, return_inverse=True)[1]
