"""Packed attention on external kernels: flash-attn (2, 3 and 4) and torch's own, for sentences longer than a tile.

The backward passes of flash-attn and of torch's variable-length attention are deterministic, so that a run repeats bit for bit. On
a GPU, the backward pass of torch's padded attention (``sdpa``) is deterministic only under
:func:`torch.use_deterministic_algorithms`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from comtip_kernels.packed_attention.reference import packed_attention_reference

FLASH_MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")
"""Modules of flash-attn 4, 3 and 2 that define ``flash_attn_varlen_func``, newest first."""
MAX_SENTENCES = 65_535
"""Most sentences that flash-attn and torch can launch on one grid axis (flash-attention issue 1786, pytorch issue 146704)."""


@cache
def flash_varlen() -> Callable[..., Any] | None:
    """Return the variable-length function of the newest flash-attn that can be imported; None if there is none.

    A release whose backward pass cannot be deterministic is returned only if there is no other: wheels of flash-attn 2 also contain
    an early flash-attn 4, which can be imported once its compiler is installed.
    """
    found = None
    for name in FLASH_MODULES:
        try:
            function = getattr(importlib.import_module(name), "flash_attn_varlen_func", None)
        except Exception:  # a package that does not fit its compiler or PyTorch can raise anything
            continue
        if function is not None and _is_deterministic(function):
            return cast("Callable[..., Any]", function)
        found = found or function
    return found


@cache
def torch_varlen() -> Callable[..., Any] | None:
    """Return torch's ``varlen_attn``, or None if this torch does not have it."""
    try:
        return getattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn", None)
    except ImportError:
        return None


def can_peer(like: Tensor) -> bool:
    """Return whether flash kernels support tensors like this one: 16 bits on a CUDA device."""
    return like.is_cuda and like.dtype in (torch.float16, torch.bfloat16)


def ready_peers(like: Tensor) -> tuple[str, ...]:
    """Return which of ``flash`` and ``varlen`` :func:`require_peer` accepts for tensors like this one."""
    if not can_peer(like):
        return ()
    flash = flash_varlen()
    ready = {"flash": flash is not None and _is_deterministic(flash), "varlen": torch_varlen() is not None}
    return tuple(name for name, usable in ready.items() if usable)


def _is_deterministic(flash: Callable[..., Any]) -> bool:
    """Return whether a function of flash-attn can be asked for a deterministic backward pass."""
    return "deterministic" in inspect.signature(flash).parameters


def _offsets(length_N: Tensor) -> Tensor:
    """Return the offsets of the sentences and the total, int32 (N + 1,)."""
    return torch.nn.functional.pad(length_N.cumsum(0), (1, 0)).to(torch.int32)


def _in_chunks(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, length_N: Tensor, longest: int
) -> Tensor:
    """Call ``attend`` on at most ``MAX_SENTENCES`` sentences at a time; splitting more of them takes one synchronisation."""
    if length_N.shape[0] <= MAX_SENTENCES:
        return attend(q, k, v, length_N, longest)
    lengths = length_N.split(MAX_SENTENCES)
    tokens = torch.stack([part.sum() for part in lengths]).tolist()
    parts = zip(*(x.split(tokens) for x in (q, k, v)), lengths, strict=True)
    return torch.cat([attend(*part, longest) for part in parts])


def _require_16_bits(impl: str, like: Tensor) -> None:
    """Raise ValueError unless the tensor is fp16 or bf16 on a CUDA device."""
    if not can_peer(like):
        raise ValueError(
            f"packed_attention: impl={impl!r} needs fp16 or bf16 on a CUDA device, not {like.dtype} on {like.device.type}; "
            "cast the operands and move them, or use impl='auto'"
        )


def _deterministic_backward(out: Tensor) -> Tensor:
    """Enable deterministic algorithms while the backward node of ``out`` runs; torch's varlen has no argument for it."""
    node = out.grad_fn
    if node is None:
        return out
    before: list[tuple[bool, bool]] = []

    def enable(_grads: Any) -> None:
        before.append(
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        )
        torch.use_deterministic_algorithms(True)

    def restore(_inputs: Any, _outputs: Any) -> None:
        enabled, warn_only = before.pop()
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

    node.register_prehook(enable)
    node.register_hook(restore)
    return out


def _flash() -> Callable[..., Any]:
    """Return flash-attn's function; raise ValueError if it is missing or has no deterministic backward pass."""
    function = flash_varlen()
    if function is None:
        raise ValueError(
            "packed_attention: impl='flash' needs flash-attn, which cannot be imported; run pip install flash-attn"
        )
    if not _is_deterministic(function):
        raise ValueError(
            f"packed_attention: impl='flash' needs a deterministic backward pass, which {function.__module__} does not have; "
            "install another flash-attn or use impl='varlen'"
        )
    return function


def _varlen() -> Callable[..., Any]:
    """Return PyTorch's varlen attention; raise ValueError if this PyTorch has none."""
    function = torch_varlen()
    if function is None:
        raise ValueError("packed_attention: impl='varlen' needs torch.nn.attention.varlen; install a newer PyTorch")
    return function


def require_peer(name: str, like: Tensor) -> None:
    """Check that ``flash`` or ``varlen`` is installed and supports tensors like this one; other names always pass.

    Raises
    ------
    ValueError
        It is not installed, lacks a deterministic backward pass, or does not support the dtype or the device.
    """
    if name in ("flash", "varlen"):
        (_flash if name == "flash" else _varlen)()
        _require_16_bits(name, like)


def packed_attention_flash(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return packed attention by deterministic flash-attn, (S, H, E); raises ValueError as :func:`require_peer` does."""
    function = _flash()
    _require_16_bits("flash", q_SHE)

    def attend(q: Tensor, k: Tensor, v: Tensor, length: Tensor, longest: int) -> Tensor:
        offsets = _offsets(length)
        lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out = function(q, k, v, **lengths, deterministic=True)
        return out[0] if isinstance(out, tuple) else out

    return _in_chunks(attend, q_SHE, k_SHE, v_SHE, length_N, longest)


def packed_attention_varlen(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return packed attention by PyTorch's varlen attention, (S, H, E); raises ValueError as :func:`require_peer` does."""
    function = _varlen()
    _require_16_bits("varlen", q_SHE)

    def attend(q: Tensor, k: Tensor, v: Tensor, length: Tensor, longest: int) -> Tensor:
        offsets = _offsets(length)
        return _deterministic_backward(function(q, k, v, offsets, offsets, longest, longest))

    return _in_chunks(attend, q_SHE, k_SHE, v_SHE, length_N, longest)


def packed_attention_sdpa(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, length_N: Tensor, longest: int) -> Tensor:
    """Return packed attention by PyTorch's SDPA on padded sentences, (S, H, E), on any device."""
    return _in_chunks(packed_attention_reference, q_SHE, k_SHE, v_SHE, length_N, longest)
