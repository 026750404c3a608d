"""Gene names as token tensors, the input of the sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comtip_fast.config.schema import TextConfig
from comtip_fast.genes.tokenizer import GENE_ID, VALUE_ID, GeneTokenizer


@dataclass
class GeneTokens:
    """Tokens and identity rows of G genes."""

    ids_GT: Tensor
    """int64; ``[GENE]``, the tokens of the name, ``[VALUE]``, then padding."""
    length_G: Tensor
    """int64, number of tokens with ``[GENE]`` and ``[VALUE]``."""
    identity_G: Tensor
    """int64, row of the identity table; 0 means no identity embedding is added."""

    def to(self, device: torch.device | str) -> GeneTokens:
        """Return the tokens on ``device``."""
        return GeneTokens(self.ids_GT.to(device), self.length_G.to(device), self.identity_G.to(device))


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

    return GeneTokens(torch.from_numpy(ids), torch.from_numpy(length), torch.from_numpy(identity.astype(np.int64)))


def take_genes(genes: GeneTokens, rows: torch.Tensor) -> GeneTokens:
    """Return the genes in ``rows``, padded to the longest of them."""
    length = genes.length_G[rows]
    width = int(length.max()) if len(rows) else 2
    return GeneTokens(genes.ids_GT[rows, :width], length, genes.identity_G[rows])
