"""Sizes to which a panel is padded, so that few distinct shapes occur over a run.

The number of genes of a panel and the number of tokens of its sentences change in every step. Whatever is stored per set of shapes,
for example a CUDA graph, would therefore be stored for nearly every step. Padding adds genes that no spot measured, and
sentences whose output nothing reads; neither changes a loss or a gradient, except by rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_GENES = 16
"""Padded numbers of genes are multiples of this, except the largest."""
_TOKENS = 64
"""Padded numbers of tokens are multiples of this."""
_DEVIATIONS = 4.0
"""Distance, in standard deviations, between two padded numbers of tokens for the same number of sentences. Most panels have
fewer tokens than the mean plus four standard deviations, so that most numbers of genes occur with only one number of tokens."""


def padded_genes(n: int, per_doubling: int, most: int) -> int:
    """Return the number of genes to which a panel of n genes is padded.

    Parameters
    ----------
    n
        Number of genes, at least 1.
    per_doubling
        Approximate number of padded sizes per doubling of the number of genes (``engine.panel_sizes``). Sizes are multiples of 16,
        so that there are fewer per doubling for small panels. 0 turns padding off.
    most
        Largest number of genes of a panel; no panel is padded to more.
    """
    if not per_doubling:
        return n
    below = 1 << max(n - 1, 1).bit_length() - 1
    step = max(_GENES, below // per_doubling // _GENES * _GENES)
    return min(-(-n // step) * step, max(n, most))


@dataclass(frozen=True)
class TokenSizes:
    """Padded numbers of tokens; they depend on the panel, not on the rank."""

    mean: float
    """Mean number of tokens of a gene's sentence."""
    deviation: float
    """Standard deviation of the number of tokens."""
    longest: int
    """Largest number of tokens of a sentence."""

    @classmethod
    def of(cls, length_G: np.ndarray, longest: int) -> TokenSizes:
        """Return the sizes for panels of genes with ``length_G`` tokens, (G,), of which none has more than ``longest``."""
        return cls(float(length_G.mean()), float(length_G.std()), longest)

    def padded(self, sentences: int, n_levels: int, most: int) -> int:
        """Return the number of tokens to which the sentences of a rank are padded.

        Parameters
        ----------
        sentences
            Number of sentences of the rank with the most sentences.
        n_levels
            Number of levels; the sentences of a gene, one per level, are equally long.
        most
            Number of tokens of the rank with the most tokens.
        """
        spread = max(1.0, _DEVIATIONS * self.deviation * math.sqrt(n_levels * sentences))
        excess = most - sentences * self.mean
        size = sentences * self.mean + max(1, math.ceil(excess / spread)) * spread
        return -(-math.ceil(min(size, sentences * self.longest)) // _TOKENS) * _TOKENS
