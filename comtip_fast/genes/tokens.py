"""Gene names as token tensors, the input of the sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from comtip_kernels import SentenceSizes
from torch import Tensor

from comtip_fast.config.schema import TextConfig
from comtip_fast.genes.panel_sizes import TokenSizes
from comtip_fast.genes.tokenizer import GENE_ID, VALUE_ID, GeneTokenizer
from comtip_fast.genes.vectors import GeneVectors

_NAMES = 64
"""Multiple to which the number of names, distinct (token, position) pairs, is rounded up."""


@dataclass(frozen=True)
class HostTokens:
    """Ids and lengths of :class:`GeneTokens` in host memory, to compute shapes without a device synchronization."""

    ids_GT: np.ndarray
    length_G: np.ndarray
    padded: TokenSizes | None = None
    """Numbers of tokens to which the sentences of a panel are padded; None turns padding off."""
    has_vector_G: np.ndarray | None = None
    """bool, whether each gene has a vector; None for a model without gene vectors."""

    def take(self, rows: np.ndarray) -> HostTokens:
        """Return the genes ``rows``; ids are cut to the longest of these genes, or keep their width if :attr:`padded` is set."""
        length = self.length_G[rows]
        width = int(length.max(initial=2)) if self.padded is None else self.ids_GT.shape[1]
        has_vector = None if self.has_vector_G is None else self.has_vector_G[rows]
        return HostTokens(self.ids_GT[rows, :width], length, self.padded, has_vector)

    def without_names(self, u_G: np.ndarray, config: TextConfig) -> HostTokens:
        """Return the genes after :func:`drop_names_or_vectors` with the same numbers; the result is not padded."""
        assert self.has_vector_G is not None
        no_name = _drops(self.has_vector_G, u_G, config)[1]
        bare = np.zeros_like(self.ids_GT)
        bare[:, 0], bare[:, 1] = GENE_ID, VALUE_ID
        ids = np.where(no_name[:, None], bare, self.ids_GT)
        return HostTokens(ids, np.where(no_name, 2, self.length_G), None, self.has_vector_G)

    def sizes(self, n_levels: int, vocabulary: int, sentences: slice) -> SentenceSizes:
        """Return the sizes of a slice of the sentence table in gene-major order, with the number of names rounded up.

        Parameters
        ----------
        n_levels
            Number of levels, Q.
        vocabulary
            Number of token ids.
        sentences
            Slice of the G Q sentences, with start and stop.
        """
        first, last = sentences.start // n_levels, -(-sentences.stop // n_levels)
        ids, length = self.ids_GT[first:last], self.length_G[first:last]
        begin = np.arange(first, last) * n_levels
        own = np.minimum(begin + n_levels, sentences.stop) - np.maximum(begin, sentences.start)
        slot_T = np.arange(ids.shape[1])
        name_GT = (slot_T > 0) & (slot_T < length[:, None] - 1)
        found = np.zeros((vocabulary, ids.shape[1]), bool)
        found[ids[name_GT], np.broadcast_to(slot_T, ids.shape)[name_GT]] = True
        # Rounded up, so that few distinct sizes occur.
        names = -(-int(found.sum()) // _NAMES) * _NAMES
        return SentenceSizes(int((own * length).sum()), last - first, names, n_levels, vocabulary)

    def tokens_of_ranks(self, n_levels: int, counts: Sequence[int]) -> np.ndarray:
        """Return the tokens per rank, int64 (ranks,); rank r has the next ``counts[r]`` sentences in gene-major order."""
        bound = np.concatenate([[0], np.cumsum(counts)])
        gene, rest = bound // n_levels, bound % n_levels
        start = np.concatenate([[0], np.cumsum(self.length_G)]) * n_levels
        return np.diff(start[gene] + rest * np.append(self.length_G, 0)[gene])

    def padded_sizes(
        self, n_levels: int, vocabulary: int, sentences: slice, counts: Sequence[int]
    ) -> tuple[SentenceSizes, int]:
        """Return the sizes of a slice padded to :attr:`padded`, and the number of sentences to add, some of which may stay empty.

        Parameters
        ----------
        n_levels, vocabulary, sentences
            As in :meth:`sizes`.
        counts
            Number of sentences of every rank; the padded number of tokens is the same on all ranks.
        """
        assert self.padded is not None
        most = int(self.tokens_of_ranks(n_levels, counts).max())
        T, S = self.ids_GT.shape[1], self.padded.padded(max(counts), n_levels, most)
        first, last = sentences.start // n_levels, -(-sentences.stop // n_levels)
        # An upper bound of the distinct pairs: each token of a gene is one, and the added sentences may be longer than theirs.
        names = min(S // n_levels + 3 * T, vocabulary * T)
        names = -(-names // _NAMES) * _NAMES
        # A sentence has at least two tokens.
        added = -(-(S - 2 * (sentences.stop - sentences.start)) // T)
        return SentenceSizes(S, last - first, names, n_levels, vocabulary), added


@dataclass
class GeneTokens:
    """Tokens, identity rows and vectors of G genes."""

    ids_GT: Tensor
    """int64 token ids: ``[GENE]``, the tokens of the name, ``[VALUE]``, then padding."""
    length_G: Tensor
    """int64, number of tokens including ``[GENE]`` and ``[VALUE]``."""
    identity_G: Tensor
    """int64, row of the identity table; 0 adds no identity embedding."""
    vector_GK: Tensor | None = None
    """float32 gene vectors; zeros for a gene without a vector. None for a model without gene vectors."""
    host: HostTokens | None = None
    """Ids and lengths in host memory; None if they have to be read from the device."""

    def to(self, device: torch.device | str) -> GeneTokens:
        """Return the tokens on ``device``."""
        vector = None if self.vector_GK is None else self.vector_GK.to(device)
        return GeneTokens(
            self.ids_GT.to(device), self.length_G.to(device), self.identity_G.to(device), vector, self.host
        )

    def with_padding(self) -> GeneTokens:
        """Return the tokens plus a gene without name and identity, which pads panels, and with :attr:`HostTokens.padded` set."""
        assert self.host is not None
        ids = self.ids_GT.new_zeros(1, self.ids_GT.shape[1])
        ids[0, 0], ids[0, 1] = GENE_ID, VALUE_ID
        host = HostTokens(
            np.concatenate([self.host.ids_GT, [[GENE_ID, VALUE_ID, *[0] * (ids.shape[1] - 2)]]]),
            np.append(self.host.length_G, 2),
            TokenSizes.of(self.host.length_G, ids.shape[1]),
            None if self.host.has_vector_G is None else np.append(self.host.has_vector_G, False),
        )
        vector = None if self.vector_GK is None else torch.nn.functional.pad(self.vector_GK, (0, 0, 0, 1))
        return GeneTokens(
            torch.cat([self.ids_GT, ids]),
            torch.nn.functional.pad(self.length_G, (0, 1), value=2),
            torch.nn.functional.pad(self.identity_G, (0, 1)),
            vector,
            host,
        )

    def rows(self, index: Tensor) -> GeneTokens:
        """Return the genes in ``index``, int64, without :attr:`host`."""
        vector = None if self.vector_GK is None else self.vector_GK[index]
        return GeneTokens(self.ids_GT[index], self.length_G[index], self.identity_G[index], vector)


def gene_tokens(
    tokenizer: GeneTokenizer,
    names: Sequence[tuple[str, str]],
    identity: np.ndarray,
    config: TextConfig,
    vector_GK: np.ndarray | None = None,
) -> GeneTokens:
    """Tokenise ``(symbol, full name)`` pairs as ``[GENE] name tokens [VALUE]``.

    Parameters
    ----------
    tokenizer
        The sub-word tokenizer.
    names
        One pair per gene; the full name may be empty.
    identity
        (G,) identity rows, 0 for a gene that was not trained.
    config
        ``max_tokens`` and ``full_name`` are read.
    vector_GK
        Gene vectors, from :func:`vector_rows`; None for a model without gene vectors. A gene with a vector and
        neither symbol nor name has no name tokens.
    """
    T = config.max_tokens + 2
    ids = np.zeros((len(names), T), np.int64)
    length = np.zeros(len(names), np.int64)
    for i, (symbol, name) in enumerate(names):
        tokens = tokenizer.encode(symbol, name if config.full_name else "", config.max_tokens)[: config.max_tokens]
        unnamed = not symbol.strip() and not name.strip() and vector_GK is not None and vector_GK[i].any()
        row = [GENE_ID, *([] if unnamed else tokens), VALUE_ID]
        ids[i, : len(row)], length[i] = row, len(row)

    vector = None if vector_GK is None else torch.from_numpy(np.ascontiguousarray(vector_GK, np.float32))
    return GeneTokens(
        torch.from_numpy(ids),
        torch.from_numpy(length),
        torch.from_numpy(identity.astype(np.int64)),
        vector,
        HostTokens(ids, length, has_vector_G=None if vector_GK is None else (vector_GK != 0).any(1)),
    )


def vector_rows(vectors: GeneVectors, keys: Sequence[str]) -> np.ndarray:
    """Return the vectors of genes by key, float32 (G, K); a row of zeros for a gene without a vector."""
    index = np.array([vectors.row.get(k, -1) for k in keys], np.int64)
    out = np.zeros((len(keys), vectors.vector_GK.shape[1]), np.float32)
    out[index >= 0] = vectors.vector_GK[index[index >= 0]]
    return out


def _drops(has_vector_G: Any, u_G: Any, config: TextConfig) -> tuple[Any, Any]:
    """Return which genes lose their vector and which their name, bool (G,); arrays on the host or tensors."""
    no_vector = has_vector_G & (u_G < config.vector_drop)
    return no_vector, has_vector_G & ~no_vector & (u_G < config.vector_drop + config.name_drop)


def drop_names_or_vectors(
    genes: GeneTokens, u_G: Tensor, config: TextConfig, u_host_G: np.ndarray | None = None
) -> GeneTokens:
    """Drop the vectors of some genes, the names of others, and the identities of both, because unseen genes have none.

    A gene without a vector keeps its name and identity.

    Parameters
    ----------
    genes
        Tokens of G genes, with :attr:`GeneTokens.vector_GK`.
    u_G
        Uniform numbers in [0, 1), one per gene.
    config
        The vector of a gene is dropped if its number is below ``vector_drop``, and its name if the number is from
        ``vector_drop`` to ``vector_drop + name_drop``.
    u_host_G
        The same numbers in host memory. If they are None, or ``genes`` has no host copy, the result has none either, so that the
        lengths of its sentences are read from the device.
    """
    assert genes.vector_GK is not None
    no_vector, no_name = _drops((genes.vector_GK != 0).any(dim=1), u_G, config)
    host = None if u_host_G is None or genes.host is None else genes.host.without_names(u_host_G, config)
    bare = torch.zeros_like(genes.ids_GT)
    bare[:, 0], bare[:, 1] = GENE_ID, VALUE_ID
    return GeneTokens(
        torch.where(no_name[:, None], bare, genes.ids_GT),
        torch.where(no_name, torch.full_like(genes.length_G, 2), genes.length_G),
        genes.identity_G * ~(no_vector | no_name),
        genes.vector_GK * ~no_vector[:, None],
        host,
    )


def take_genes(genes: GeneTokens, rows: Tensor, host_rows: np.ndarray | None = None) -> GeneTokens:
    """Return the genes ``rows``; ids are cut to the longest of these genes, or keep their width if the host copy pads panels.

    Parameters
    ----------
    genes
        Tokens of all genes.
    rows
        int64 (G,), on the device of the tokens.
    host_rows
        The same rows in host memory. If they are None, or ``genes`` has no host copy, the longest length is read from the device.
    """
    length = genes.length_G[rows]
    vector = None if genes.vector_GK is None else genes.vector_GK[rows]
    if host_rows is None or genes.host is None:
        width, host = int(length.max()) if len(rows) else 2, None
    else:
        host = genes.host.take(host_rows)
        width = host.ids_GT.shape[1]
    return GeneTokens(genes.ids_GT[rows, :width], length, genes.identity_G[rows], vector, host)
