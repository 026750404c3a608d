"""Attention of one query per sentence and head, where the tokens are both keys and values."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from comtip_kernels.dispatch import choose, with_triton
from comtip_kernels.one_query_attention.cpu import one_query_attention_cpu
from comtip_kernels.one_query_attention.reference import one_query_attention_reference

__all__ = ["LONGEST", "MOST_HEADS", "one_query_attention", "one_query_attention_reference"]
LONGEST, MOST_HEADS = 64, 16
"""Tokens of the longest sentence, and heads, that the Triton kernels support."""
_IMPLEMENTATIONS = {
    "reference": one_query_attention_reference,
    "cpu": one_query_attention_cpu,
    "triton": with_triton("comtip_kernels.one_query_attention.triton_op", "one_query_attention_triton"),
}


def one_query_attention(
    query_NHD: Tensor,
    x_SD: Tensor,
    length_M: Tensor,
    *,
    scale: float,
    longest: int | None = None,
    first_M: Tensor | None = None,
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto",
) -> Tensor:
    """Return softmax(scale * query x^T) x within each of the first N of M concatenated sentences.

    If only one token of a sentence is read after attention, keys and values need not be computed for every token. With
    q_h the query of head h, and W_k,h and W_v,h the head's rows of the projections of keys and values,

        q_h (x W_k,h^T)^T = (q_h W_k,h) x^T        p (x W_v,h^T) = (p x) W_v,h^T

    so that the projections apply to one vector per sentence and head, and attention reads x itself. The bias of keys adds the
    same number to all scores of a query, which softmax removes. (The same rearrangement is that of absorbed projections in
    multi-head latent attention, DeepSeek-AI 2024.)

    Parameters
    ----------
    query_NHD
        Queries (N, H, D) of the first N sentences: H heads, D the width of the tokens; any strides. The Triton kernels multiply in
        bf16 if an operand is bf16 or bf16 autocast is enabled.
    x_SD
        Tokens (S, D) of all sentences; any strides.
    length_M
        Tokens of each of M >= N sentences (>= 0), integers that sum to S. Tokens of sentences beyond the N-th have no
        query, and a gradient of 0.
    scale
        Factor of the scores.
    longest
        Maximum of ``length_M``, if known; otherwise it is read from the tensor, which synchronises with a GPU.
    first_M
        :func:`comtip_kernels.sentence_start` of the lengths, which only the Triton kernels read; they compute it if it is None.
    impl
        Implementation (:mod:`comtip_kernels.dispatch`). On a GPU, ``auto`` selects ``reference`` for sentences of more than 64
        tokens and more than 16 heads.

    Returns
    -------
    Tensor
        (N, H, D), in the dtype of the products; 0 for a sentence without tokens.

    Raises
    ------
    ValueError
        If ``impl='triton'`` does not support the operands, the length or the number of heads.
    """
    if longest is None:
        longest = int(length_M.max()) if length_M.numel() else 0
    fits = longest <= LONGEST and query_NHD.shape[1] <= MOST_HEADS
    if impl == "triton" and not fits:
        raise ValueError(
            f"one_query_attention: impl='triton' supports {LONGEST} tokens per sentence and {MOST_HEADS} heads, not {longest} and "
            f"{query_NHD.shape[1]}; use impl='auto'"
        )
    order = ("reference",) if query_NHD.is_cuda and not fits else None
    run = choose("one_query_attention", impl, (query_NHD, x_SD), _IMPLEMENTATIONS, order)
    more = (first_M,) if run is _IMPLEMENTATIONS["triton"] else ()
    out: Tensor = run(query_NHD, x_SD, length_M, longest, scale, *more)
    return out
