"""Attention inside many short sentences."""

from __future__ import annotations

from torch import Tensor

from comtip_kernels.dispatch import Impl, choose
from comtip_kernels.packed_attention.cpu import packed_attention_cpu
from comtip_kernels.packed_attention.reference import packed_attention_reference

__all__ = ["packed_attention", "packed_attention_reference"]
_HAVE = {"reference": packed_attention_reference, "cpu": packed_attention_cpu}


def packed_attention(
    q_NTHE: Tensor, k_NTHE: Tensor, v_NTHE: Tensor, length_N: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """Attend within each of N sentences of at most T tokens, H heads of width E.

    Parameters
    ----------
    q_NTHE, k_NTHE, v_NTHE
        Queries, keys, values.
    length_N
        Tokens of each sentence (>= 1).
    impl
        Which implementation; see :mod:`comtip_kernels.dispatch`.

    Returns
    -------
    Tensor
        (N, T, H, E); rows past a sentence's end carry no meaning.
    """
    return choose("packed_attention", impl, q_NTHE, _HAVE)(q_NTHE, k_NTHE, v_NTHE, length_N)
