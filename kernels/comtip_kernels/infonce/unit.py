"""Unit vectors of InfoNCE, rounded once to the numbers that the kernels multiply.

Positives, logits and gradients all read the same rounded vectors. If positives were computed from vectors that are more exact
than those of the logits, the loss would be biased: by -0.07 for tf32 at scale 100 and cosine 1, where the exact loss is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from comtip_kernels.tl_common import can_launch, product_mode


def unit_vectors(*vectors: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Return the vectors normalised to length 1 and rounded once, so that converting them to operands of ``dtype`` is exact.

    Parameters
    ----------
    *vectors
        (n, D) each, any length and dtype.
    dtype
        Dtype in which the kernels multiply (:func:`comtip_kernels.operand_dtype`); None rounds nothing. Vectors that the Triton
        kernels do not take, because of their device or because they are fp64, are not rounded either.

    Returns
    -------
    tuple of Tensor
        (n, D) each, fp32 (fp64 for fp64 vectors). Gradients pass the rounding unchanged.
    """
    wide = [v.to(torch.promote_types(v.dtype, torch.float32)) for v in vectors]
    unit = [F.normalize(v, dim=-1) for v in wide]
    if dtype is None or not can_launch(vectors[0].device):
        return tuple(unit)
    return tuple(round_operand(v, dtype) if v.dtype == torch.float32 else v for v in unit)


def round_operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 numbers rounded to the precision in which ``dtype`` operands are multiplied: bf16, tf32, or unchanged for tf32x3.

    Parameters
    ----------
    x
        fp32, any shape.
    dtype
        ``torch.bfloat16`` or ``torch.float32``.

    Returns
    -------
    Tensor
        fp32; the gradient passes unchanged.
    """
    mode = product_mode(dtype)
    if mode == "tf32x3":
        return x
    exact = x.detach()
    if mode == "bf16":
        rounded = exact.to(torch.bfloat16).float()
    else:  # to the 10 bits of mantissa that tf32 keeps; tensor cores would truncate instead
        rounded = ((exact.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    # The difference is exact in fp32, and so is the sum.
    return x + (rounded - exact)
