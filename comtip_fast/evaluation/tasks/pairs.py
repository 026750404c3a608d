"""Pair discrimination: area under the ROC curve of true against mispaired genes and values, given the image.

The pair head scores true and mispaired (gene, level) sentences in the context of an image vector. A head that knows only which
levels are plausible for a gene reaches the same AUC with the image of another spot. Therefore the difference of the two AUCs is
a score too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PairScores:
    """Scores of M true and M mispaired sentences, and the spot of each pair."""

    true_M: np.ndarray
    false_M: np.ndarray
    spot_M: np.ndarray
    """int64, index of the spot."""


class RankedPairs:
    """Area under the ROC curve for any weights of the spots; scores are sorted once."""

    def __init__(self, scores: PairScores) -> None:
        both = np.concatenate([scores.true_M, scores.false_M])
        _, rank = np.unique(both, return_inverse=True)
        m = scores.true_M.size
        self._true, self._false, self._spot = rank[:m], rank[m:], scores.spot_M
        self._n = int(rank.max(initial=-1)) + 1

    def auc(self, weight_N: np.ndarray) -> float:
        """Return the AUC; 0.5 is chance, and ties count half. NaN if all weights are 0."""
        weight = weight_N[self._spot]
        true = np.bincount(self._true, weight, self._n)
        false = np.bincount(self._false, weight, self._n)
        total = true.sum() * false.sum()
        return float((true * (np.cumsum(false) - false / 2)).sum() / total) if total > 0 else float("nan")


def gain(own: RankedPairs, elsewhere: RankedPairs, weight_N: np.ndarray) -> float:
    """Return the AUC in the true context minus the AUC in the context of other spots."""
    return own.auc(weight_N) - elsewhere.auc(weight_N)
