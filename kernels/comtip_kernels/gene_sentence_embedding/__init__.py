"""Gene-name and value embedding of many short sentences at once, with the LayerNorm that follows."""

from __future__ import annotations

from torch import Tensor

from comtip_kernels.dispatch import Impl, choose, with_triton
from comtip_kernels.gene_sentence_embedding.cpu import gene_sentence_embedding_cpu
from comtip_kernels.gene_sentence_embedding.plan import SentencePlan, plan_sentences, sentence_start
from comtip_kernels.gene_sentence_embedding.reference import gene_sentence_embedding_reference

__all__ = [
    "SentencePlan",
    "gene_sentence_embedding",
    "gene_sentence_embedding_reference",
    "plan_sentences",
    "sentence_start",
]
_HAVE = {
    "reference": gene_sentence_embedding_reference,
    "cpu": gene_sentence_embedding_cpu,
    "triton": with_triton("comtip_kernels.gene_sentence_embedding.op", "gene_sentence_embedding_triton"),
}


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
    identity_N: Tensor | None = None,
    identity_ID: Tensor | None = None,
    gain_D: Tensor | None = None,
    bias_D: Tensor | None = None,
    eps: float = 1e-5,
    plan: SentencePlan | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Sum token, type and position rows; the last slot of each sentence reads its level instead of a token.

    Parameters
    ----------
    ids_NT
        Token ids, slot 0 is ``[GENE]``; slots past ``length_N`` are ignored.
    length_N
        Tokens of each sentence, its value slot included (2..T).
    level_lo_N, level_hi_N, mix_N
        Level of the value slot; with the other two given, the rows are mixed ``(1 - mix) lo + mix hi``.
    token_VD, type_3D, position_TD, level_QD
        The tables, of one floating dtype.
    identity_N, identity_ID
        Identity of each sentence's gene and its table, added at slot 0; 0 is "none" and adds nothing.
    gain_D, bias_D, eps
        LayerNorm of each token, where a gain is given.
    plan
        What :func:`plan_sentences` found for these very ids, lengths, levels and identities; worked out here when None.
    impl
        Which implementation; see :mod:`comtip_kernels.dispatch`.

    Returns
    -------
    Tensor
        (S, D): the tokens of every sentence, end to end; S = ``length_N.sum()``.

    Raises
    ------
    ValueError
        If mixing or identity is given by half, or ``impl`` cannot run.
    """
    if (level_hi_N is None) != (mix_N is None):
        raise ValueError("gene_sentence_embedding: level_hi_N and mix_N go together")
    if identity_ID is not None and identity_N is None:
        raise ValueError("gene_sentence_embedding: identity_ID needs identity_N")
    return choose("gene_sentence_embedding", impl, token_VD, _HAVE)(
        ids_NT, length_N, level_lo_N, token_VD, type_3D, position_TD, level_QD, level_hi_N=level_hi_N, mix_N=mix_N,
        identity_N=identity_N, identity_ID=identity_ID, gain_D=gain_D, bias_D=bias_D, eps=eps, plan=plan,
    )  # fmt: skip
