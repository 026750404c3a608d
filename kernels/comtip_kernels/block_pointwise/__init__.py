"""The work between the products of a pre-norm transformer block: residual sum and LayerNorm, bias and GELU."""

from __future__ import annotations

import torch
from torch import Tensor

from comtip_kernels.block_pointwise.reference import bias_gelu_reference, residual_norm_reference
from comtip_kernels.dispatch import Impl, choose, with_triton

__all__ = ["bias_gelu", "residual_norm"]
_TRITON = "comtip_kernels.block_pointwise.triton_op"
_NORM = {"reference": residual_norm_reference, "triton": with_triton(_TRITON, "residual_norm_triton")}
_GELU = {"reference": bias_gelu_reference, "triton": with_triton(_TRITON, "bias_gelu_triton")}


def residual_norm(
    x_Nd: Tensor,
    branch_Nd: Tensor,
    branch_bias_d: Tensor,
    gain_d: Tensor,
    bias_d: Tensor,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the stream of a pre-norm block after a branch, ``x + branch + branch_bias``, and its LayerNorm (Ba et al. 2016).

    The bias of the linear layer that ends the branch is added here, so that its gradient is summed where it is computed. On a GPU,
    one kernel reads both operands once; the backward pass adds the gradients of the sum and of its norm in one kernel, too. Sums
    and statistics are fp32.

    Parameters
    ----------
    x_Nd
        Stream before the branch, N rows of width d.
    branch_Nd, branch_bias_d
        Result of the branch, and the bias to add to it. The gradient of the branch has its dtype.
    gain_d, bias_d
        Parameters of the norm.
    eps
        Added to the variance.
    dtype
        Dtype of the norm; None is that of the branch, which a product has computed.
    impl
        Implementation (:mod:`comtip_kernels.dispatch`).

    Returns
    -------
    tuple
        The sum (N, d) in the dtype of ``x_Nd``, and its norm (N, d).

    Raises
    ------
    ValueError
        If ``impl`` is not available or does not support the operands.
    """
    operands = (x_Nd, branch_Nd, branch_bias_d, gain_d, bias_d)
    dtype = branch_Nd.dtype if dtype is None else dtype
    out: tuple[Tensor, Tensor] = choose("residual_norm", impl, operands, _NORM)(*operands, eps, dtype)
    return out


def bias_gelu(x_Nd: Tensor, bias_d: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Return GELU(x + bias) with the exact GELU (Hendrycks and Gimpel 2016), in the dtype of ``x_Nd``.

    On a GPU, the backward pass sums the gradient of the bias while it computes that of ``x``.

    Parameters
    ----------
    x_Nd
        Product of a linear layer without its bias, N rows of width d.
    bias_d
        The bias.
    impl
        Implementation (:mod:`comtip_kernels.dispatch`).

    Raises
    ------
    ValueError
        If ``impl`` is not available or does not support the operands.
    """
    out: Tensor = choose("bias_gelu", impl, (x_Nd, bias_d), _GELU)(x_Nd, bias_d)
    return out
