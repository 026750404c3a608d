"""Gene names as token tensors, the input of the sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from comtip_kernels import SentenceSizes
from torch import Tensor

from comtip_fast.config.schema import TextConfig
from comtip_fast.genes.tokenizer import GENE_ID, VALUE_ID, GeneTokenizer

_NAMES = 64
"""Multiple to which the number of distinct name tokens is rounded up."""


@dataclass(frozen=True)
class HostTokens:
    """A copy of :class:`GeneTokens` in host memory, from which shapes follow without reading a device."""

    ids_GT: np.ndarray
    length_G: np.ndarray

    def take(self, rows: np.ndarray) -> HostTokens:
        """Return the genes in ``rows``, padded to the longest of them."""
        length = self.length_G[rows]
        return HostTokens(self.ids_GT[rows, : int(length.max(initial=2))], length)

    def sizes(self, n_levels: int, vocabulary: int, sentences: slice) -> SentenceSizes:
        """Return the sizes of a slice of the table's sentences, which are in gene-major order.

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
        # Rounded up, so that few sizes occur.
        names = -(-int(found.sum()) // _NAMES) * _NAMES
        return SentenceSizes(int((own * length).sum()), last - first, names, n_levels, vocabulary)


@dataclass
class GeneTokens:
    """Tokens and identity rows of G genes."""

    ids_GT: Tensor
    """int64; ``[GENE]``, the tokens of the name, ``[VALUE]``, then padding."""
    length_G: Tensor
    """int64, number of tokens with ``[GENE]`` and ``[VALUE]``."""
    identity_G: Tensor
    """int64, row of the identity table; 0 means no identity embedding is added."""
    host: HostTokens | None = None
    """Ids and lengths in host memory; None if they have to be read from the device."""

    def to(self, device: torch.device | str) -> GeneTokens:
        """Return the tokens on ``device``."""
        return GeneTokens(self.ids_GT.to(device), self.length_G.to(device), self.identity_G.to(device), self.host)


def gene_tokens(
    tokenizer: GeneTokenizer,
    names: Sequence[tuple[str, str]],
    identity: np.ndarray,
    config: TextConfig,
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
    """
    T = config.max_tokens + 2
    ids = np.zeros((len(names), T), np.int64)
    length = np.zeros(len(names), np.int64)
    for i, (symbol, name) in enumerate(names):
        tokens = tokenizer.encode(symbol, name if config.full_name else "", config.max_tokens)[: config.max_tokens]
        row = [GENE_ID, *tokens, VALUE_ID]
        ids[i, : len(row)], length[i] = row, len(row)
    host = HostTokens(ids, length)
    return GeneTokens(
        torch.from_numpy(ids), torch.from_numpy(length), torch.from_numpy(identity.astype(np.int64)), host
    )


def take_genes(genes: GeneTokens, rows: Tensor, host_rows: np.ndarray | None = None) -> GeneTokens:
    """Return the genes in ``rows``, padded to the longest of them.

    Parameters
    ----------
    genes
        Tokens of all genes.
    rows
        int64 (G,), on the device of the tokens.
    host_rows
        The same rows in host memory; without them the longest length is read from the device.
    """
    length = genes.length_G[rows]
    if host_rows is None or genes.host is None:
        width, host = int(length.max()) if len(rows) else 2, None
    else:
        host = genes.host.take(host_rows)
        width = host.ids_GT.shape[1]
    return GeneTokens(genes.ids_GT[rows, :width], length, genes.identity_G[rows], host)
