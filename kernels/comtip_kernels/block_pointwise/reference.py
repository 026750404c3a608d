"""Residual sum with LayerNorm, and bias with GELU, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def residual_norm_reference(
    x_Nd: Tensor,
    branch_Nd: Tensor,
    branch_bias_d: Tensor,
    gain_d: Tensor,
    bias_d: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the sum in the dtype of ``x_Nd``, and its LayerNorm in ``dtype``."""
    wide = torch.promote_types(x_Nd.dtype, torch.float32)
    stream = (x_Nd.to(wide) + branch_Nd.to(wide) + branch_bias_d.to(wide)).to(x_Nd.dtype)
    normed = F.layer_norm(stream.to(wide), gain_d.shape, gain_d.to(wide), bias_d.to(wide), eps)
    return stream, normed.to(dtype)


def bias_gelu_reference(x_Nd: Tensor, bias_d: Tensor) -> Tensor:
    """Return GELU(x + bias) in the dtype of ``x_Nd``."""
    wide = torch.promote_types(x_Nd.dtype, torch.float32)
    return F.gelu(x_Nd.to(wide) + bias_d.to(wide)).to(x_Nd.dtype)
