"""Gene-name and value embedding of many short sentences at once."""

from __future__ import annotations

from torch import Tensor

from comtip_kernels.dispatch import Impl, choose
from comtip_kernels.gene_sentence_embedding.reference import gene_sentence_embedding_reference

__all__ = ["gene_sentence_embedding", "gene_sentence_embedding_reference"]
_HAVE = {"reference": gene_sentence_embedding_reference}


def gene_sentence_embedding(
    ids_NT: Tensor,
    length_N: Tensor,
    level_lo_N: Tensor,
    token_VD: Tensor,
    type_3D: Tensor,
    position_TD: Tensor,
    level_QD: Tensor,
    *,
    level_hi_N: Tensor | None = None,
    mix_N: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Sum token, type and position rows; the last slot of each sentence reads its level instead of a token.

    Parameters
    ----------
    ids_NT
        Token ids, slot 0 is ``[GENE]``; slots past ``length_N`` are ignored.
    length_N
        Tokens of each sentence, its value slot included (>= 2).
    level_lo_N, level_hi_N, mix_N
        Level of the value slot; with the other two given, the rows are mixed ``(1 - mix) lo + mix hi``.
    token_VD, type_3D, position_TD, level_QD
        The tables.
    impl
        Which implementation; see :mod:`comtip_kernels.dispatch`.

    Returns
    -------
    Tensor
        (N, T, D), zero past each sentence's end.
    """
    return choose("gene_sentence_embedding", impl, token_VD, _HAVE)(
        ids_NT, length_N, level_lo_N, token_VD, type_3D, position_TD, level_QD, level_hi_N=level_hi_N, mix_N=mix_N
    )
