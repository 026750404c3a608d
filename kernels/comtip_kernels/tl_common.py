"""Shared by all Triton kernels: launch conditions, the dtype rule, input precision and tile sizes.

The dtype rule, which every operation follows:

* Triton kernels multiply operands of one dtype: bf16 if any operand is bf16 or bf16 autocast is enabled on the
  device, fp32 otherwise (:func:`operand_dtype`).
* Products accumulate in fp32. Statistics, weights and sums of gradients are fp32; a gradient is returned in the
  dtype of its input.
* fp32 operands are multiplied as tf32 if ``torch.set_float32_matmul_precision`` allows it, and as three tf32 products
  (``tf32x3``, the accuracy of fp32) if it does not.
* fp16 and fp64 are not supported by the Triton kernels: ``impl="auto"`` falls back to another implementation, and
  ``impl="triton"`` raises (:func:`comtip_kernels.dispatch.choose`).
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch do not include Triton
    triton = None
    tl = None

HAS_TRITON = triton is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""True if the kernels run in Triton's interpreter: on any device, slowly, for tests."""
Mode = Literal["bf16", "tf32", "tf32x3"]
"""How operands are multiplied; see the rule above."""
TRITON_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes that the Triton kernels accept."""


def can_launch(device: torch.device) -> bool:
    """Return whether Triton kernels can run on tensors of ``device``."""
    return HAS_TRITON and (INTERPRETING or device.type == "cuda")


def operand_dtype(*operands: Tensor) -> torch.dtype:
    """Return the dtype in which the Triton kernels multiply these operands: bf16 or fp32.

    Parameters
    ----------
    *operands
        Floating-point tensors of one operation, on one device.

    Returns
    -------
    torch.dtype
        ``torch.bfloat16`` if any operand is bf16 or bf16 autocast is enabled, otherwise ``torch.float32``.
    """
    device = operands[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    return torch.bfloat16 if autocast or any(x.dtype == torch.bfloat16 for x in operands) else torch.float32


@torch.compiler.assume_constant_result
def _matmul_precision() -> str:
    """Return PyTorch's fp32 matmul precision, which torch.compile reads while tracing: the call would break the graph."""
    return torch.get_float32_matmul_precision()


def product_mode(dtype: torch.dtype) -> Mode:
    """Return how operands of ``dtype`` are multiplied on tensor cores; tile sizes are chosen by this."""
    if dtype != torch.float32:
        return "bf16"
    return "tf32x3" if _matmul_precision() == "highest" else "tf32"


def input_precision(mode: Mode) -> str:
    """Return Triton's ``input_precision`` for a mode; the interpreter multiplies in fp32."""
    return "ieee" if INTERPRETING or mode == "bf16" else mode


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context manager that makes ``device`` the current CUDA device; it does nothing for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first argument.

    Triton launches on the current device. Without the guard, tensors of another device would be read through
    pointers that are not valid there.

    Parameters
    ----------
    kernel
        A ``triton.jit`` function whose first argument is a tensor.
    grid
        Number of programs along each axis.
    *args, **options
        Arguments of the kernel, in order; constexprs and launch options by name.
    """
    with device_guard(args[0].device):
        kernel[grid](*args, **options)


def cdiv(n: int, size: int) -> int:
    """Return ``n / size`` rounded up; a call of Triton's own function takes 6 us, and a step has 180."""
    return -(-n // size)


def power_of_2(n: int, least: int = 16) -> int:
    """Return the smallest power of 2 that is at least ``n`` and at least ``least``."""
    return max(least, 1 << max(0, int(n) - 1).bit_length())


def fit_tiles(config: dict[str, Any], width: int, small: dict[str, int] | None = None) -> dict[str, Any]:
    """Return a tile configuration for vectors of ``width`` elements.

    Parameters
    ----------
    config
        Tile sizes, ``num_warps`` and ``num_stages``; ``BK`` is reduced to the padded width (:func:`power_of_2`) if that is
        smaller.
    width
        Length D of the vectors.
    small
        Tile sizes that replace those of ``config`` in the interpreter, which processes one program at a time.
    """
    chosen = config | ((small or {}) if INTERPRETING else {})
    return chosen | {"BK": min(int(chosen["BK"]), power_of_2(width))}
