"""What every Triton kernel here shares: when it can run, how operands are multiplied, and how tiles fit a width."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch comes without Triton
    triton = None
    tl = None

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Kernels were defined for Triton's interpreter: any device, slow, for tests."""


def can_launch(device: torch.device) -> bool:
    """Tell whether Triton kernels can run on tensors of ``device``."""
    return triton is not None and (INTERPRETING or device.type == "cuda")


def precision(x: Tensor) -> str:
    """Return how fp32 operands are multiplied: on tensor cores unless the user asked torch for the highest precision."""
    strict = INTERPRETING or x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if strict else "tf32"


def power_of_2(n: int, least: int = 16) -> int:
    """Return the least power of 2 that is at least ``n`` and at least ``least``."""
    return max(least, 1 << max(0, int(n) - 1).bit_length())


def fitted(config: dict[str, Any], D: int, small: dict[str, int] | None = None) -> dict[str, Any]:
    """Return a config for vectors of width D; ``small`` replaces tiles under the interpreter, which takes one number at a time."""
    chosen = config | ((small or {}) if INTERPRETING else {})
    return chosen | {"BK": min(int(chosen["BK"]), power_of_2(D))}
