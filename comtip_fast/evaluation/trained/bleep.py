"""A BLEEP-like model: image and expression in one space, prediction by the mean of the nearest training spots.

After Xie et al. 2023 (BLEEP), with the image encoder of the evaluated model: the same projection heads and contrastive loss.
Unlike BLEEP, the number of neighbours is chosen by validation, and expression is centred within sections instead of
batch-corrected.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comtip_fast.config.schema import RunConfig
from comtip_fast.evaluation.trained.data import TrainingData
from comtip_fast.evaluation.trained.encoder import initial_encoder
from comtip_fast.evaluation.trained.task import ExpressionTask, TargetBatch
from comtip_fast.models import VisionEncoder
from comtip_fast.models.projection_head import ResidualProjection
from comtip_fast.objectives import soft_contrastive
from comtip_fast.training.validation import evenly

NEIGHBOURS = (10, 25, 50, 100)
"""Numbers of neighbours that validation chooses from."""
DEFAULT_NEIGHBOURS = 50
"""Number of neighbours without validation sections."""
MAX_KEYS = 50_000
"""Largest number of training spots to search for neighbours; of a larger cohort, evenly spaced spots are taken."""
QUERIES_AT_ONCE = 256
KEYS_AT_ONCE = 4096


def nearest_average(
    query_ND: Tensor, key_MD: Tensor, values_MG: np.ndarray, known_MG: np.ndarray, counts: Iterable[int]
) -> dict[int, np.ndarray]:
    """Average the values of the keys with the highest cosine similarity to each query.

    Parameters
    ----------
    query_ND, key_MD
        Vectors on one device; need not be normalised.
    values_MG, known_MG
        Values of the M keys, and a mask of the known values; unknown values are left out of the average.
    counts
        Numbers of neighbours; a number above M averages all keys.

    Returns
    -------
    dict
        float32 (N, G) by number of neighbours; 0 where no neighbour has a known value.
    """
    wanted = sorted(set(counts))
    most = min(wanted[-1], len(key_MD))
    keys = F.normalize(key_MD.float(), dim=-1)
    masked = np.where(known_MG, values_MG, 0.0).astype(np.float32)
    out = {k: np.zeros((len(query_ND), values_MG.shape[1]), np.float32) for k in wanted}
    for start in range(0, len(query_ND), QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        similar = F.normalize(query_ND[rows].float(), dim=-1) @ keys.T
        nearest = similar.topk(most, dim=1).indices.cpu().numpy()
        total = np.zeros((len(nearest), values_MG.shape[1]), np.float32)
        known = np.zeros_like(total)
        for j in range(most):
            total += masked[nearest[:, j]]
            known += known_MG[nearest[:, j]]
            for k in wanted:
                if j + 1 == min(k, most):
                    out[k][rows] = total / np.maximum(known, 1.0)
    return out


class JointSpace(nn.Module):
    """Projections of the image encoder's features and of the expression of ``n_genes`` genes to ``dim`` shared dimensions."""

    def __init__(self, vision: VisionEncoder, n_genes: int, dim: int, seed: int) -> None:
        super().__init__()
        self.vision = vision
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.image = ResidualProjection(vision.width, dim)
            self.expression = ResidualProjection(n_genes, dim)

    def forward(self, features_BP: Tensor, z_BG: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors (B, D) of images and of expression."""
        return self.image(self.vision(features_BP).pooled_Bd), self.expression(z_BG)


class BleepTask(ExpressionTask):
    """Trains a :class:`JointSpace` from initial weights; ``data`` and ``config`` are those of :class:`ExpressionTask`."""

    def __init__(self, data: TrainingData, config: RunConfig) -> None:
        seed = config.train.seed
        vision = initial_encoder(data.predictor, seed)
        super().__init__(data, config, JointSpace(vision, len(data.targets.keys), config.align.dim, seed))
        self._counts = NEIGHBOURS if data.validation else (DEFAULT_NEIGHBOURS,)

    def loss(self, module: Any, batch: TargetBatch) -> Tensor:
        """See :meth:`ExpressionTask.loss`."""
        return soft_contrastive(*module(batch.features, batch.z_BG))

    def choose(self, setting: str) -> None:
        """Use the number of neighbours of one setting, e.g. ``k50``, from now on."""
        self._counts = (int(setting.removeprefix("k")),)

    def learnt(self, cohort: str) -> np.ndarray:
        """Return which target genes a training section of the cohort measured, bool (G,); only its spots are averaged."""
        targets = self.data.targets
        own: np.ndarray = targets.known_SG[np.unique(targets.section_N[self.data.rows_of_cohort(cohort)])].any(0)
        return own

    def predicted(self, features: Iterable[Tensor], cohort: str) -> dict[str, np.ndarray]:
        """See :meth:`ExpressionTask.predicted`; setting ``k10`` averages the 10 nearest of the cohort's training spots."""
        joint = self.module.eval()
        assert isinstance(joint, JointSpace)
        queries = []
        for chunk in features:
            with self.autocast():
                queries.append(joint.image(joint.vision(chunk).pooled_Bd).float())
        rows = self.data.rows_of_cohort(cohort)
        rows = rows[evenly(rows.size, MAX_KEYS)]
        values, known = self.data.targets.of_spots(rows)
        keys = []
        for start in range(0, rows.size, KEYS_AT_ONCE):
            part = torch.from_numpy(values[start : start + KEYS_AT_ONCE]).to(self.data.device)
            with self.autocast():
                keys.append(joint.expression(part).float())
        found = nearest_average(torch.cat(queries), torch.cat(keys), values, known, self._counts)
        return {f"k{k}": v for k, v in found.items()}
