"""Attention inside many short sentences."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from comtip_kernels.dispatch import choose, with_triton
from comtip_kernels.packed_attention.cpu import packed_attention_cpu
from comtip_kernels.packed_attention.peers import (
    can_peer,
    flash_varlen,
    packed_attention_flash,
    packed_attention_varlen,
    torch_varlen,
)
from comtip_kernels.packed_attention.reference import packed_attention_reference

__all__ = ["packed_attention", "packed_attention_reference"]
LONGEST_TILE = 48
"""Tokens of the longest sentence that the tiles of 64 tokens are for; longer ones are flash-attn's or torch's."""
_HAVE = {
    "reference": packed_attention_reference,
    "cpu": packed_attention_cpu,
    "triton": with_triton("comtip_kernels.packed_attention.op", "packed_attention_triton"),
    "flash": packed_attention_flash,
    "varlen": packed_attention_varlen,
}


def packed_attention(
    q_SHE: Tensor,
    k_SHE: Tensor,
    v_SHE: Tensor,
    length_N: Tensor,
    *,
    longest: int | None = None,
    impl: Literal["auto", "triton", "cpu", "reference", "flash", "varlen"] = "auto",
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
        As everywhere (:mod:`comtip_kernels.dispatch`), and ``flash`` and ``varlen``. ``auto`` on a GPU takes the Triton
        kernel up to 48 tokens, beyond that flash-attn, torch's varlen attention or the reference: the first that can.

    Returns
    -------
    Tensor
        (S, H, E).

    Raises
    ------
    ValueError
        If a sentence is longer than ``impl='triton'`` can take, or ``impl`` cannot run.
    """
    if longest is None:
        longest = int(length_N.max()) if length_N.numel() else 0
    if longest > LONGEST_TILE:
        if impl == "triton":
            raise ValueError(
                f"packed_attention: a sentence of {longest} tokens; impl='triton' takes {LONGEST_TILE}: 'auto'"
            )
        if impl == "auto" and q_SHE.is_cuda:
            able = can_peer(q_SHE)
            impl = "flash" if able and flash_varlen() else "varlen" if able and torch_varlen() else "reference"
    return choose("packed_attention", impl, q_SHE, _HAVE)(q_SHE, k_SHE, v_SHE, length_N, longest)
