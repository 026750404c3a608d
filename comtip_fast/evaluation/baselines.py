"""Supervised ridge baselines: what colour alone, and what the encoder's features with labels, would give."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from comtip_fast.evaluation.metrics import mean_with_zeros, pcc_per_gene

ALPHAS = tuple(10.0**k for k in range(-2, 6))
FOLDS = 5


@dataclass
class RidgeModel:
    """Coefficients on standardised inputs."""

    mean_F: np.ndarray
    std_F: np.ndarray
    weight_FG: np.ndarray
    intercept_G: np.ndarray
    alpha: float
    cv_pcc: float = float("nan")
    """Mean PCC over folds of the training spots, for the alpha chosen; inputs are compared by it."""

    def predict(self, x_NF: np.ndarray) -> np.ndarray:
        """Return (N, G)."""
        return ((x_NF - self.mean_F) / self.std_F) @ self.weight_FG + self.intercept_G


def fit_ridge(x_NF: np.ndarray, y_NG: np.ndarray, section_N: np.ndarray) -> RidgeModel:
    """Fit ridge regression on training spots; alpha by leaving sections out, or spots in five folds of one section.

    Inputs are standardised over all training spots, targets centred within each section: sections differ in
    level for reasons of chemistry, and a test section's level is not asked for (PCC does not see it).

    Raises
    ------
    ValueError
        With fewer than 10 training spots.
    """
    if len(x_NF) < 10:
        raise ValueError(f"ridge needs at least 10 training spots, there are {len(x_NF)}")
    x_NF, y_NG = np.asarray(x_NF, np.float64), np.asarray(y_NG, np.float64)
    sections = np.unique(section_N)
    fold_N = section_N if sections.size > 1 else np.arange(len(x_NF)) % FOLDS
    total = np.zeros(len(ALPHAS))
    folds = np.unique(fold_N)
    for fold in folds:
        out = fold_N == fold
        models = _path(x_NF[~out], y_NG[~out], section_N[~out])
        # The score of a baseline is the score that it is judged by: correlation within a section.
        total += [mean_with_zeros(pcc_per_gene(y_NG[out], m.predict(x_NF[out]))) or 0.0 for m in models]
    best = int(total.argmax())
    return replace(_path(x_NF, y_NG, section_N)[best], cv_pcc=float(total[best] / folds.size))


def _path(x_NF: np.ndarray, y_NG: np.ndarray, section_N: np.ndarray) -> list[RidgeModel]:
    """Fit every alpha from one decomposition."""
    mean, std = x_NF.mean(0), x_NF.std(0)
    std = np.where(std > 1e-12, std, 1.0)
    z = (x_NF - mean) / std
    intercept = y_NG.mean(0)
    centred = np.empty_like(y_NG)
    for s in np.unique(section_N):
        own = section_N == s
        centred[own] = y_NG[own] - y_NG[own].mean(0)
    left, size, right = np.linalg.svd(z, full_matrices=False)
    projected = left.T @ centred
    return [
        RidgeModel(mean, std, right.T @ (projected * (size / (size**2 + alpha))[:, None]), intercept, alpha)
        for alpha in ALPHAS
    ]
