"""Regression of expression from the image encoder: fine-tuned from pretraining, or trained from initial weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from comtip_fast.config.schema import RunConfig
from comtip_fast.evaluation.baselines import fit_ridge
from comtip_fast.evaluation.folds import ridge_folds
from comtip_fast.evaluation.trained.data import TrainingData
from comtip_fast.evaluation.trained.encoder import initial_encoder, pretrained_encoder
from comtip_fast.evaluation.trained.task import ExpressionTask, TargetBatch
from comtip_fast.models import VisionEncoder
from comtip_fast.objectives import masked_mse

MIN_SPOTS = 10
"""Smallest number of training spots for fitting the initial weights of the head."""


class Regressor(nn.Module):
    """The image encoder and a linear head on its mean patch feature."""

    def __init__(self, vision: VisionEncoder, n_genes: int, seed: int) -> None:
        super().__init__()
        self.vision = vision
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(vision.width, n_genes)

    def forward(self, features_BP: Tensor) -> Tensor:
        """Return predicted targets (B, G)."""
        predicted: Tensor = self.head(self.vision(features_BP).pooled_Bd)
        return predicted


class RegressionTask(ExpressionTask):
    """Trains a :class:`Regressor` on the mean squared error of standardised expression.

    Parameters
    ----------
    data, config
        As for :class:`ExpressionTask`.
    pretrained
        True starts from the model's weights, with the linear probe as head (Kumar et al. 2022: a random head distorts
        pretrained features). False starts from initial weights.
    """

    def __init__(self, data: TrainingData, config: RunConfig, *, pretrained: bool) -> None:
        seed, predictor = config.train.seed, data.predictor
        vision = pretrained_encoder(predictor) if pretrained else initial_encoder(predictor, seed)
        super().__init__(data, config, Regressor(vision, len(data.targets.keys), seed))
        if pretrained:
            self._start_from_probe()

    def loss(self, module: Any, batch: TargetBatch) -> Tensor:
        """See :meth:`ExpressionTask.loss`."""
        return masked_mse(module(batch.features), batch.z_BG, batch.known_BG)

    def predicted(self, features: Iterable[Tensor], cohort: str) -> dict[str, np.ndarray]:
        """See :meth:`ExpressionTask.predicted`; there is one setting."""
        self.module.eval()
        parts = []
        for chunk in features:
            with self.autocast():
                parts.append(self.module(chunk).float().cpu().numpy())
        return {"": np.concatenate(parts)}

    @torch.no_grad()
    def _start_from_probe(self) -> None:
        """Set the head to ridge regression on the encoder's features, one fit per group of genes that the same sections measured.

        Genes that fewer than :data:`MIN_SPOTS` training spots measured keep random weights.
        """
        regressor, targets, x = self.module, self.data.targets, self.data.pooled_Nd
        assert isinstance(regressor, Regressor)
        xy = self.data.shards.spots.loc[self.data.spots, ["x_px", "y_px"]].to_numpy(float)
        for sections in np.unique(targets.known_SG, axis=1).T:
            columns = np.flatnonzero((sections == targets.known_SG.T).all(1))
            rows = np.flatnonzero(np.isin(targets.section_N, np.flatnonzero(sections)))
            if rows.size < MIN_SPOTS:
                continue
            fold = ridge_folds(targets.section_N[rows], xy[rows])
            model = fit_ridge(x[rows], targets.of_spots(rows)[0][:, columns], targets.section_N[rows], fold)
            weight_FG = model.weight_FG / model.std_F[:, None]
            bias_G = model.intercept_G - model.mean_F @ weight_FG
            regressor.head.weight[columns] = torch.from_numpy(weight_FG.T).to(regressor.head.weight)
            regressor.head.bias[columns] = torch.from_numpy(bias_G).to(regressor.head.bias)
