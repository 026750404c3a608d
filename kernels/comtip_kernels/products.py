"""Matrix products by PyTorch (cuBLAS) that the operators use in addition to their own kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """Write ``a @ b`` to ``out``, or add it to ``out``; products of bf16 operands are not rounded to bf16.

    Parameters
    ----------
    out
        fp32, (n, m).
    a, b
        (n, k) and (k, m) of one dtype, bf16 or fp32.
    accumulate
        Whether the product is added to ``out``; if False, the content of ``out`` is not read.
    """
    beta = 1 if accumulate else 0
    # Autocast leaves operators with ``out`` as they are.
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:  # PyTorch before 2.10 refuses an fp32 addend here
        torch.addmm(out, a, b, torch.float32, beta=beta, out=out)
    else:  # the interpreter: a CPU has no product of bf16 operands with a result in fp32
        torch.addmm(out, a.float(), b.float(), beta=beta, out=out)
