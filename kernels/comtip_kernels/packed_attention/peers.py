"""The same call on other people's kernels: flash-attn (2, 3 and 4) and torch's own; for sentences longer than a tile."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from comtip_kernels.packed_attention.reference import packed_attention_reference

FLASH_MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")
"""Where flash-attn 4, 3 and 2 keep ``flash_attn_varlen_func``, newest first."""
MOST_SENTENCES = 65_535
"""Their kernels put sentences on an axis of the grid that ends here (flash-attention issue 1786, pytorch issue 146704)."""


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


def ready_peers(like: Tensor) -> tuple[str, ...]:
    """Return which of ``flash`` and ``varlen`` are installed and take tensors like this one."""
    if not can_peer(like):
        return ()
    return tuple(name for name, find in (("flash", flash_varlen), ("varlen", torch_varlen)) if find() is not None)


def _ends(length_N: Tensor) -> Tensor:
    return torch.nn.functional.pad(length_N.cumsum(0), (1, 0)).to(torch.int32)


def _in_pieces(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, length_N: Tensor, longest: int
) -> Tensor:
    """Attend to at most ``MOST_SENTENCES`` at a time; where there are more, one synchronisation tells where to cut."""
    if length_N.shape[0] <= MOST_SENTENCES:
        return attend(q, k, v, length_N, longest)
    lengths = length_N.split(MOST_SENTENCES)
    tokens = torch.stack([part.sum() for part in lengths]).tolist()
    parts = zip(*(x.split(tokens) for x in (q, k, v)), lengths, strict=True)
    return torch.cat([attend(*part, longest) for part in parts])


def _refuse(impl: str, like: Tensor) -> None:
    if not can_peer(like):
        raise ValueError(
            f"packed_attention: impl={impl!r} takes fp16 or bf16 on a CUDA device, not {like.dtype} on {like.device.type}"
        )


def packed_attention_flash(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return (S, H, E) by flash-attn; raises where it is not installed."""
    function = flash_varlen()
    if function is None:
        raise ValueError(
            "packed_attention: impl='flash' needs flash-attn, which is not installed (see `comtip doctor`)"
        )
    _refuse("flash", q_SHE)

    def attend(q: Tensor, k: Tensor, v: Tensor, length: Tensor, longest: int) -> Tensor:
        ends = _ends(length)
        names = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out = function(q, k, v, **names)
        return out[0] if isinstance(out, tuple) else out

    return _in_pieces(attend, q_SHE, k_SHE, v_SHE, length_N, longest)


def packed_attention_varlen(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return (S, H, E) by torch's varlen attention; raises where torch has none."""
    function = torch_varlen()
    if function is None:
        raise ValueError("packed_attention: impl='varlen' needs a torch that has torch.nn.attention.varlen")
    _refuse("varlen", q_SHE)

    def attend(q: Tensor, k: Tensor, v: Tensor, length: Tensor, longest: int) -> Tensor:
        ends = _ends(length)
        return function(q, k, v, ends, ends, longest, longest)

    return _in_pieces(attend, q_SHE, k_SHE, v_SHE, length_N, longest)


def packed_attention_sdpa(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return (S, H, E) by padding; on any device."""
    return _in_pieces(packed_attention_reference, q_SHE, k_SHE, v_SHE, length_N, longest)
