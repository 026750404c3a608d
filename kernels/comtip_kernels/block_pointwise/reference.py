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
    stream = (x_Nd.float() + branch_Nd.float() + branch_bias_d.float()).to(x_Nd.dtype)
    normed = F.layer_norm(stream.float(), gain_d.shape, gain_d.float(), bias_d.float(), eps)
    return stream, normed.to(dtype)


def bias_gelu_reference(x_Nd: Tensor, bias_d: Tensor) -> Tensor:
    """Return GELU(x + bias) in the dtype of ``x_Nd``."""
    return F.gelu(x_Nd.float() + bias_d.float()).to(x_Nd.dtype)
