"""Attention inside many short sentences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from comtip_kernels.dispatch import choose, with_triton
from comtip_kernels.packed_attention.cpu import packed_attention_cpu, packed_attention_qkv_cpu
from comtip_kernels.packed_attention.peers import (
    packed_attention_flash,
    packed_attention_sdpa,
    packed_attention_varlen,
    ready_peers,
)
from comtip_kernels.packed_attention.reference import packed_attention_reference

__all__ = ["packed_attention", "packed_attention_qkv", "packed_attention_reference"]
Attention = Literal["auto", "triton", "cpu", "reference", "flash", "varlen", "sdpa"]
LONGEST_TILE = 48
"""Tokens of the longest sentence that the tiles of 64 tokens are for; longer ones are flash-attn's or torch's."""
_HAVE = {
    "reference": packed_attention_reference,
    "cpu": packed_attention_cpu,
    "triton": with_triton("comtip_kernels.packed_attention.op", "packed_attention_triton"),
    "flash": packed_attention_flash,
    "varlen": packed_attention_varlen,
    "sdpa": packed_attention_sdpa,
}


def _of_three(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda qkv_S3HE, *rest: function(*qkv_S3HE.unbind(1), *rest)


_HAVE_QKV = {name: _of_three(function) for name, function in _HAVE.items()} | {"cpu": packed_attention_qkv_cpu}


def _choose(like: Tensor, longest: int, impl: str, have: dict[str, Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """Return what attends: by the caller's word, or by device, dtype and the length of the longest sentence."""
    if longest <= LONGEST_TILE:
        return choose("packed_attention", impl, like, have)
    if impl == "triton":
        raise ValueError(
            f"packed_attention: a sentence of {longest} tokens; impl='triton' takes {LONGEST_TILE}: 'auto'"
        )
    order = (*ready_peers(like), "sdpa") if like.is_cuda else None
    return choose("packed_attention", impl, like, have, order)


def _longest(length_N: Tensor) -> int:
    return int(length_N.max()) if length_N.numel() else 0


def packed_attention(
    q_SHE: Tensor,
    k_SHE: Tensor,
    v_SHE: Tensor,
    length_N: Tensor,
    *,
    longest: int | None = None,
    impl: Attention = "auto",
) -> Tensor:
    """Attend within each of N sentences that lie end to end, S tokens in all, H heads of width E.

    Parameters
    ----------
    q_SHE, k_SHE, v_SHE
        Queries, keys, values; any strides.
    length_N
        Tokens of each sentence (>= 0); they sum to S.
    longest
        The greatest length, where the caller knows it; read from ``length_N`` otherwise (a synchronisation on a GPU).
    impl
        As everywhere (:mod:`comtip_kernels.dispatch`), and other people's kernels: ``flash`` (flash-attn 2, 3 or 4),
        ``varlen`` (torch's) and ``sdpa`` (torch's, padded, few enough sentences at a time). ``auto`` on a GPU takes the
        Triton kernel up to 48 tokens, beyond that the first of these three that can.

    Returns
    -------
    Tensor
        (S, H, E).

    Raises
    ------
    ValueError
        If a sentence is longer than ``impl='triton'`` can take, or ``impl`` cannot run.
    """
    longest = _longest(length_N) if longest is None else longest
    return _choose(q_SHE, longest, impl, _HAVE)(q_SHE, k_SHE, v_SHE, length_N, longest)


def packed_attention_qkv(
    qkv_S3HE: Tensor, length_N: Tensor, *, longest: int | None = None, impl: Attention = "auto"
) -> Tensor:
    """Attend as :func:`packed_attention` does, with queries, keys and values as one projection makes them.

    On a CPU that spares the backward a pass over the gradient. Order sentences by length where you can: then nothing is moved.

    Parameters
    ----------
    qkv_S3HE
        Queries, keys and values of S tokens.
    length_N, longest, impl
        As in :func:`packed_attention`.

    Returns
    -------
    Tensor
        (S, H, E).

    Raises
    ------
    ValueError
        As in :func:`packed_attention`.
    """
    longest = _longest(length_N) if longest is None else longest
    return _choose(qkv_S3HE, longest, impl, _HAVE_QKV)(qkv_S3HE, length_N, longest)
