"""Gene sentences of measured expression: text vectors of spots, logits of the pair head, vectors of genes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from comtip_kernels import pair_scores, pool_weights, table_pool
from torch import Tensor

from comtip_fast.data.upload import upload
from comtip_fast.inference import GeneQuery, Predictor
from comtip_fast.models import SentenceTable
from comtip_fast.runtime.devices import autocast

SPOTS = 512
"""Spots per pass."""
GENES_PER_PASS = 256


class SpotSentences:
    """The sentences of G genes, and the levels of N spots.

    Parameters
    ----------
    predictor
        The trained model.
    genes
        The G genes, all measured in every spot.
    values_NG
        log1p of counts per 10,000.
    """

    def __init__(self, predictor: Predictor, genes: Sequence[GeneQuery], values_NG: np.ndarray) -> None:
        self.table, rows = sentence_table(predictor, genes)
        levels = predictor.bundle.levels.levels(values_NG, rows)
        self.levels_NG = upload(torch.from_numpy(levels).long(), self.table.rows_GQD.device)
        self._by_image = predictor.config.loss.paat.context == "image"

    def vectors(self) -> np.ndarray:
        """Return the text vector of each spot, not normalised, float32 (N, D)."""
        parts = [self._pooled(self.table.rows_GQD, part) for part in self.levels_NG.split(SPOTS)]
        return torch.cat(parts).float().cpu().numpy()

    def pair_logits(self, levels_NG: Tensor, image_ND: np.ndarray, context_N: np.ndarray) -> np.ndarray:
        """Return the pair head's logits of the sentences (gene, level), float32 (N, G).

        Parameters
        ----------
        levels_NG
            int64 (N, G), the levels to score.
        image_ND
            Image vectors of the spots.
        context_N
            int64 (N,), for each spot the index of the spot that gives its context: an image, or with
            ``loss.paat.context=text`` a text.
        """
        image = upload(torch.from_numpy(image_ND[context_N]), self.table.pair_GQD.device).to(self.table.pair_GQD.dtype)
        out = []
        for start in range(0, len(levels_NG), SPOTS):
            rows = slice(start, start + SPOTS)
            if self._by_image:
                found = pair_scores(image[rows], self.table.pair_GQD, levels_NG[rows])
            else:
                found = self._in_text(levels_NG[rows], self.levels_NG[torch.from_numpy(context_N[rows])])
            out.append(found.float())
        return torch.cat(out).cpu().numpy()

    def _in_text(self, levels: Tensor, true: Tensor) -> Tensor:
        """Return logits with texts as context; the scored gene is removed from the text."""
        table, everything = self.table, torch.ones_like(true, dtype=torch.bool)
        return pair_scores(
            self._pooled(table.unit_GQD, true),
            table.pair_GQD,
            levels,
            true_levels_BG=true,
            projected_GQD=table.unit_GQD,
            weight_BG=pool_weights(table.scores_GQ, true, everything),
        )

    def _pooled(self, rows_GQD: Tensor, levels: Tensor) -> Tensor:
        """Return the text vectors of spots from their levels."""
        return table_pool(rows_GQD, self.table.scores_GQ, levels, torch.ones_like(levels, dtype=torch.bool))


@torch.no_grad()
def sentence_table(predictor: Predictor, genes: Sequence[GeneQuery]) -> tuple[SentenceTable, np.ndarray]:
    """Return the sentence table of G genes, fp32, and the rows of the genes in the level table, int64 (G,)."""
    tables, rows = [], []
    for start in range(0, len(genes), GENES_PER_PASS):
        tokens, row = predictor.tokens(genes[start : start + GENES_PER_PASS])
        with autocast(predictor.config.train.precision, predictor.device):
            tables.append(predictor.model.sentence_table(tokens))
        rows.append(row.numpy())
    joined = (torch.cat([part.float() for part in parts]) for parts in zip(*tables, strict=True))
    return SentenceTable(*joined), np.concatenate(rows)


def gene_vectors(predictor: Predictor, genes: Sequence[GeneQuery]) -> np.ndarray:
    """Return the mean unit sentence vector of each gene over its positive levels, float32 (G, D)."""
    table, _ = sentence_table(predictor, genes)
    return table.unit_GQD[:, 1:].mean(1).cpu().numpy()
