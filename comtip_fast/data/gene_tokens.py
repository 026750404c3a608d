"""Gene names as the token tensors that the sentence encoder reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from comtip_fast.config.schema import TextConfig
from comtip_fast.genes import GENE_ID, VALUE_ID, GeneTokenizer
from comtip_fast.models import GeneTokens


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
        The project's sub-word tokenizer.
    names
        One pair per gene; the full name may be empty.
    identity
        (G,) identity rows, 0 for a gene that training did not see.
    config
        Longest name in tokens, and whether full names are read.
    """
    T = config.max_tokens + 2
    ids = np.zeros((len(names), T), np.int64)
    length = np.zeros(len(names), np.int64)
    for i, (symbol, name) in enumerate(names):
        tokens = tokenizer.encode(symbol, name if config.full_name else "", config.max_tokens)[: config.max_tokens]
        row = [GENE_ID, *tokens, VALUE_ID]
        ids[i, : len(row)], length[i] = row, len(row)
    # Shorter panels need no wider a tensor than their longest sentence; the table is built from slices of this.
    return GeneTokens(torch.from_numpy(ids), torch.from_numpy(length), torch.from_numpy(identity.astype(np.int64)))


def take_genes(genes: GeneTokens, rows: torch.Tensor) -> GeneTokens:
    """Return the genes in ``rows``, padded only to the longest of them."""
    length = genes.length_G[rows]
    width = int(length.max()) if len(rows) else 2
    return GeneTokens(genes.ids_GT[rows, :width], length, genes.identity_G[rows])
