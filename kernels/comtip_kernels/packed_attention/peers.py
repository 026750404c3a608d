"""The same call on other people's kernels: flash-attn (2, 3 and 4) and torch's own, for sentences longer than a tile."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

FLASH_MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")
"""Where flash-attn 4, 3 and 2 keep ``flash_attn_varlen_func``, newest first."""


@cache
def flash_varlen() -> Callable[..., Any] | None:
    """Return the newest flash-attn's varlen function, or None where none is installed."""
    for name in FLASH_MODULES:
        try:
            return getattr(importlib.import_module(name), "flash_attn_varlen_func", None)
        except (ImportError, OSError, RuntimeError):
            continue
    return None


@cache
def torch_varlen() -> Callable[..., Any] | None:
    """Return torch's ``varlen_attn``, or None in a torch that has none."""
    try:
        return getattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn", None)
    except ImportError:
        return None


def can_peer(like: Tensor) -> bool:
    """Tell whether flash kernels take tensors like this one: on a GPU, 16 bits."""
    return like.is_cuda and like.dtype in (torch.float16, torch.bfloat16)


def _ends(length_N: Tensor) -> Tensor:
    return torch.nn.functional.pad(length_N.cumsum(0), (1, 0)).to(torch.int32)


def packed_attention_flash(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return (S, H, E) by flash-attn; raises where it is not installed."""
    function = flash_varlen()
    if function is None:
        raise ValueError(
            "packed_attention: impl='flash' needs flash-attn, which is not installed (see `comtip doctor`)"
        )
    ends = _ends(length_N)
    names = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}
    out = function(q_SHE, k_SHE, v_SHE, **names)
    return out[0] if isinstance(out, tuple) else out


def packed_attention_varlen(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return (S, H, E) by torch's varlen attention; raises where torch has none."""
    function = torch_varlen()
    if function is None:
        raise ValueError("packed_attention: impl='varlen' needs a torch that has torch.nn.attention.varlen")
    ends = _ends(length_N)
    return function(q_SHE, k_SHE, v_SHE, ends, ends, longest, longest)
