"""What every Triton kernel here shares: when it can run, and a dot that the interpreter gets right."""

from __future__ import annotations

import os

import torch

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
