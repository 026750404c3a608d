"""Gene-name and value embedding of many short sentences, with LayerNorm."""

from __future__ import annotations

from torch import Tensor

from comtip_kernels.dispatch import Impl, choose, with_triton
from comtip_kernels.gene_sentence_embedding.cpu import copy_rows_cpu, gene_sentence_embedding_cpu
from comtip_kernels.gene_sentence_embedding.plan import (
    SentencePlan,
    SentenceSizes,
    first_tokens,
    plan_panel,
    plan_sentences,
    sentence_start,
)
from comtip_kernels.gene_sentence_embedding.reference import copy_rows_reference, gene_sentence_embedding_reference

__all__ = [
    "SentencePlan",
    "SentenceSizes",
    "copy_sentence_rows",
    "first_tokens",
    "gene_sentence_embedding",
    "gene_sentence_embedding_reference",
    "plan_panel",
    "plan_sentences",
    "sentence_start",
]
_IMPLEMENTATIONS = {
    "reference": gene_sentence_embedding_reference,
    "cpu": gene_sentence_embedding_cpu,
    "triton": with_triton("comtip_kernels.gene_sentence_embedding.triton_op", "gene_sentence_embedding_triton"),
}
_COPIES = {
    "reference": copy_rows_reference,
    "cpu": copy_rows_cpu,
    "triton": with_triton("comtip_kernels.gene_sentence_embedding.triton_op", "copy_rows_triton"),
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
    distinct: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Embed the tokens of gene sentences as sums of token, type and position rows, with LayerNorm if a gain is given.

    The last slot of each sentence reads the row of its level instead of a token. The formula is in
    :mod:`comtip_kernels.gene_sentence_embedding.reference`.

    Parameters
    ----------
    ids_NT
        Token ids, integers; slot 0 is ``[GENE]``, slots beyond ``length_N`` are ignored.
    length_N
        Tokens of each sentence including its value slot (2..T), integers.
    level_lo_N, level_hi_N, mix_N
        Level of the value slot; with all three, the row is ``(1 - mix) lo + mix hi``.
    token_VD, type_3D, position_TD, level_QD
        Tables. The Triton kernels take fp32 or bf16, and sum and normalise rows in fp32; the other implementations
        compute in the widest dtype of the tables.
    identity_N, identity_ID
        Identity of the gene of each sentence and the table of identities, added at slot 0; identity 0 adds nothing.
    gain_D, bias_D, eps
        LayerNorm of each token, if a gain is given.
    plan
        Result of :func:`plan_sentences` or :func:`plan_panel` for these ids, lengths, levels and identities; if None,
        ``cpu`` and ``triton`` call :func:`plan_sentences`. ``reference`` needs no plan.
    distinct
        Return the distinct rows of ``plan``, which is then required, instead of the tokens: what is computed of each row alone needs
        to be computed once only. :func:`copy_sentence_rows` turns them into the tokens.
    impl
        Implementation; see :mod:`comtip_kernels.dispatch`.

    Returns
    -------
    Tensor
        (S, D), the tokens of the concatenated sentences, S = ``length_N.sum()``, or with ``distinct`` (U, D), the rows of the plan;
        in the dtype of the token table on Triton kernels, otherwise in the widest dtype of the tables.

    Raises
    ------
    ValueError
        If only one of ``level_hi_N`` and ``mix_N`` is given, or ``identity_ID`` without ``identity_N``, or ``distinct`` without
        ``plan``, or if ``impl`` does not support the operands.
    """
    if distinct and plan is None:
        raise ValueError(
            "gene_sentence_embedding: distinct=True returns the rows of a plan; pass plan, e.g. of plan_sentences"
        )
    if (level_hi_N is None) != (mix_N is None):
        raise ValueError("gene_sentence_embedding: pass both level_hi_N and mix_N, or neither")
    if identity_ID is not None and identity_N is None:
        raise ValueError("gene_sentence_embedding: identity_ID was passed without identity_N; pass both or neither")
    out: Tensor = choose("gene_sentence_embedding", impl, (token_VD, type_3D, position_TD, level_QD), _IMPLEMENTATIONS)(
        ids_NT,
        length_N,
        level_lo_N,
        token_VD,
        type_3D,
        position_TD,
        level_QD,
        level_hi_N=level_hi_N,
        mix_N=mix_N,
        identity_N=identity_N,
        identity_ID=identity_ID,
        gain_D=gain_D,
        bias_D=bias_D,
        eps=eps,
        plan=plan,
        distinct=distinct,
    )
    return out


def copy_sentence_rows(rows_UC: Tensor, plan: SentencePlan, *, impl: Impl = "auto") -> Tensor:
    """Return the row of each token, ``rows_UC[plan.row_S]``; gradients of equal tokens are summed in a fixed order, in fp32 on a GPU.

    Parameters
    ----------
    rows_UC
        A row of any width for each of the distinct rows of a plan, for example those of :func:`gene_sentence_embedding` with
        ``distinct=True``, or a projection of them.
    plan
        Result of :func:`plan_sentences` or :func:`plan_panel`.
    impl
        Implementation; see :mod:`comtip_kernels.dispatch`.

    Returns
    -------
    Tensor
        (S, C), in the dtype of the rows.

    Raises
    ------
    ValueError
        If ``impl`` does not support the operands.
    """
    out: Tensor = choose("copy_sentence_rows", impl, (rows_UC,), _COPIES)(rows_UC, plan)
    return out
