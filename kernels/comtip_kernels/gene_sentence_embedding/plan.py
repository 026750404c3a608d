"""Which tokens of a batch of gene sentences share a row, computed once per batch.

Sentences are concatenated without padding, S tokens in all. The embedding of a token depends on its id and slot, at slot 0 also
on the identity, and at the value slot on the level and the slot. A panel of G genes at Q levels repeats each name Q times,
so S tokens have U << S distinct rows. These are computed (and normalised) once and copied. The backward pass of LayerNorm is
linear in the gradient for a fixed input, so the gradient is summed over equal tokens before LayerNorm. What remains is what any
embedding needs: S rows written forward and S rows read backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GENE_SLOT, NAME_SLOT, VALUE_SLOT = 0, 1, 2
_KIND, _HIGH, _SLOT = 1 << 60, 1 << 32, 1 << 20


@dataclass(frozen=True)
class SentencePlan:
    """Equal tokens of N sentences with S tokens in all and U distinct rows.

    Tensors are on the device of the sentences; ``row_S``, ``order_S`` and ``start_U1`` are int32, the others int64. A plan by
    :func:`plan_panel` may contain rows that no token has; ``sentence_U``, ``slot_U`` and ``token_U`` then describe another token.
    """

    row_S: Tensor
    """Row of each token of the concatenated sentences."""
    order_S: Tensor
    """Tokens sorted by row, ascending within a row: the order of sums over equal tokens."""
    start_U1: Tensor
    """Offset of each row in ``order_S``, and S at the end."""
    kind_U: Tensor
    """``GENE_SLOT``, ``NAME_SLOT`` or ``VALUE_SLOT``; ascending."""
    sentence_U: Tensor
    """A sentence that contains the row and determines its levels, mix and identity."""
    slot_U: Tensor
    """Slot of the row in its sentence."""
    token_U: Tensor
    """Token id of the row; not used for ``VALUE_SLOT``."""
    most: int
    """Number of tokens of the most frequent row, or an upper bound."""
    genes: int
    """Number of ``GENE_SLOT`` rows, which come first."""
    names: int
    """Number of ``NAME_SLOT`` rows, which follow the ``GENE_SLOT`` rows."""


@dataclass(frozen=True)
class SentenceSizes:
    """Sizes of N sentences that the host knows without reading a tensor; input of :func:`plan_panel`."""

    tokens: int
    """Number of tokens of all sentences, S."""
    genes: int
    """Number of genes; every sentence belongs to one of them."""
    names: int
    """Upper bound of the number of distinct (token, slot) pairs of the names."""
    levels: int
    """Number of levels, Q."""
    vocabulary: int
    """Number of token ids."""


def sentence_start(length_N: Tensor) -> Tensor:
    """Return the offset of each concatenated sentence, (N,)."""
    return length_N.cumsum(0) - length_N


def first_tokens(length_N: Tensor, tokens: int) -> Tensor:
    """Return, for each of S = ``tokens`` tokens, the index of the first token of its sentence, int32 (S,)."""
    start_N = sentence_start(length_N).to(torch.int32)
    return torch.repeat_interleave(start_N, length_N, output_size=tokens)


def plan_sentences(
    ids_NT: Tensor, length_N: Tensor, level_lo_N: Tensor, *, identity_N: Tensor | None = None, mixed: bool = False
) -> SentencePlan:
    """Find the distinct rows of N sentences.

    Parameters
    ----------
    ids_NT, length_N, level_lo_N, identity_N
        As in :func:`comtip_kernels.gene_sentence_embedding`; at most 2^20 slots and 2^28 ids.
    mixed
        True if value slots mix two levels; each sentence then has a value row of its own.

    Returns
    -------
    SentencePlan
        S, U, ``most``, ``genes`` and ``names`` are read on the host, which synchronises with a GPU.
    """
    T = ids_NT.shape[1]
    inside_NT = torch.arange(T, device=ids_NT.device) < length_N[:, None]
    sentence_S, slot_S = inside_NT.nonzero(as_tuple=True)
    token_S = ids_NT[sentence_S, slot_S].long()
    value_S = slot_S == length_N[sentence_S] - 1
    first_S = slot_S == 0
    own_S = 0 if identity_N is None else identity_N.long()[sentence_S]
    name_key = token_S * _SLOT + slot_S + NAME_SLOT * _KIND
    value_key = VALUE_SLOT * _KIND + (sentence_S if mixed else level_lo_N.long()[sentence_S] * _SLOT + slot_S)
    key_S = torch.where(value_S, value_key, torch.where(first_S, token_S * _HIGH + own_S, name_key))
    sorted_S, order_S = torch.sort(key_S, stable=True)
    new_S = torch.ones_like(sorted_S, dtype=torch.bool)
    new_S[1:] = sorted_S[1:] != sorted_S[:-1]
    row_S = torch.empty_like(order_S, dtype=torch.int32)
    row_S[order_S] = (new_S.cumsum(0) - 1).to(torch.int32)
    start_U = new_S.nonzero().squeeze(1)
    start_U1 = torch.cat([start_U, start_U.new_full((1,), key_S.shape[0])])
    model_U = order_S[start_U]
    kind_U = sorted_S[start_U] // _KIND
    counts = torch.stack([(kind_U == GENE_SLOT).sum(), (kind_U == NAME_SLOT).sum()]).tolist()
    return SentencePlan(
        row_S=row_S,
        order_S=order_S.to(torch.int32),
        start_U1=start_U1.to(torch.int32),
        kind_U=kind_U,
        sentence_U=sentence_S[model_U],
        slot_U=slot_S[model_U],
        token_U=token_S[model_U],
        most=int(start_U1.diff().max()) if start_U.numel() else 0,
        genes=counts[0],
        names=counts[1],
    )


def plan_panel(ids_NT: Tensor, length_N: Tensor, level_N: Tensor, gene_N: Tensor, sizes: SentenceSizes) -> SentencePlan:
    """Plan the sentences of a panel from sizes that the host knows: nothing is read, and no shape depends on data.

    There is one row per gene, per (token, slot) of a name and per (level, slot); levels are not mixed. Rows that no sentence has
    stay unused. Genes without an identity have one row each, whereas :func:`plan_sentences` lets them share one.

    Parameters
    ----------
    ids_NT, length_N, level_N
        As ``ids_NT``, ``length_N`` and ``level_lo_N`` of :func:`plan_sentences`; each sentence has 2 to T tokens.
    gene_N
        int64, gene of each sentence, 0 to ``sizes.genes`` - 1. Sentences of one gene have equal ids and identity.
    sizes
        Sizes of these sentences.

    Returns
    -------
    SentencePlan
        ``most`` is an upper bound: N, the number of sentences.
    """
    (N, T), S, device = ids_NT.shape, sizes.tokens, ids_NT.device
    words = sizes.genes + sizes.names
    U = words + sizes.levels * T
    sentence_S = torch.repeat_interleave(torch.arange(N, device=device), length_N, output_size=S)
    slot_S = torch.arange(S, device=device) - sentence_start(length_N)[sentence_S]
    token_S = ids_NT[sentence_S, slot_S].long()
    value_S, first_S = slot_S == length_N[sentence_S] - 1, slot_S == 0
    # Names are numbered in a table of all (token, slot) pairs; its last entry collects the other tokens.
    pair_S = (token_S * T + slot_S).masked_fill(value_S | first_S, sizes.vocabulary * T)
    found = torch.zeros(sizes.vocabulary * T + 1, dtype=torch.int64, device=device).scatter_(0, pair_S, 1)
    name_S = sizes.genes + (found.cumsum(0) - 1)[pair_S]
    value_row_S = words + level_N.long()[sentence_S] * T + slot_S
    row_S = torch.where(first_S, gene_N[sentence_S], torch.where(value_S, value_row_S, name_S)).to(torch.int32)
    sorted_S, order_S = torch.sort(row_S, stable=True)
    row_U1 = torch.arange(U + 1, device=device, dtype=torch.int32)
    start_U1 = torch.searchsorted(sorted_S, row_U1, out_int32=True)
    # An unused row is described by the token that follows, which is valid; nothing reads the row.
    model_U = order_S[start_U1[:-1].clamp_max(max(S - 1, 0))]
    kind_U = (row_U1[:-1] >= sizes.genes).long() + (row_U1[:-1] >= words).long()
    return SentencePlan(
        row_S=row_S,
        order_S=order_S.to(torch.int32),
        start_U1=start_U1,
        kind_U=kind_U,
        sentence_U=sentence_S[model_U],
        slot_U=slot_S[model_U],
        token_U=token_S[model_U],
        most=N,  # a sentence contains a row at most once
        genes=sizes.genes,
        names=sizes.names,
    )
