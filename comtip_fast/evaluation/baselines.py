"""Ridge regression from spot features to expression, for the supervised baselines."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from comtip_fast.metrics import mean_pcc

ALPHAS = tuple(10.0**k for k in range(-2, 6))
FOLDS = 5


@dataclass
class RidgeModel:
    """Ridge regression on standardised inputs."""

    mean_F: np.ndarray
    std_F: np.ndarray
    weight_FG: np.ndarray
    intercept_G: np.ndarray
    alpha: float
    cv_pcc: float = float("nan")
    """Cross-validated mean PCC on the training spots, for the chosen alpha; used to choose between inputs."""

    def predict(self, x_NF: np.ndarray, columns: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the predictions of all genes, float64 (N, G), or only of the genes ``columns``, (N, g)."""
        return ((x_NF - self.mean_F) / self.std_F) @ self.weight_FG[:, columns] + self.intercept_G[columns]


def fit_ridge(
    x_NF: np.ndarray, y_NG: np.ndarray, section_N: np.ndarray, fold_N: np.ndarray | None = None
) -> RidgeModel:
    """Fit ridge regression on training spots, with alpha chosen by cross-validation.

    Inputs are standardised over all training spots. Targets are centred within each section, because sections differ in
    level for technical reasons and PCC does not depend on the level.

    Parameters
    ----------
    x_NF, y_NG
        Inputs and targets of the N training spots.
    section_N
        Section of each spot.
    fold_N
        Fold of each spot in the cross-validation; default: one fold per section, or five folds of the spots if there is one
        section.

    Raises
    ------
    ValueError
        There are fewer than 10 training spots.
    """
    if len(x_NF) < 10:
        raise ValueError(f"ridge needs at least 10 training spots, but there are {len(x_NF)}; add training sections")
    x_NF, y_NG = np.asarray(x_NF, np.float64), np.asarray(y_NG, np.float64)
    sections = np.unique(section_N)
    if fold_N is None:
        fold_N = section_N if sections.size > 1 else np.arange(len(x_NF)) % FOLDS
    total = np.zeros(len(ALPHAS))
    folds = np.unique(fold_N)
    for fold in folds:
        held_out = fold_N == fold
        models = _fit_all_alphas(x_NF[~held_out], y_NG[~held_out], section_N[~held_out])
        # Cross-validation uses the evaluation's score: correlation within a section.
        total += [mean_pcc(y_NG[held_out], m.predict(x_NF[held_out])) for m in models]
    best = int(total.argmax())
    return replace(_fit_all_alphas(x_NF, y_NG, section_N)[best], cv_pcc=float(total[best] / folds.size))


def _fit_all_alphas(x_NF: np.ndarray, y_NG: np.ndarray, section_N: np.ndarray) -> list[RidgeModel]:
    """Fit one model per alpha from a single SVD."""
    mean, std = x_NF.mean(0), x_NF.std(0)
    std = np.where(std > 1e-12, std, 1.0)
    z = (x_NF - mean) / std
    intercept = y_NG.mean(0)
    centred = np.empty_like(y_NG)
    for s in np.unique(section_N):
        rows = section_N == s
        centred[rows] = y_NG[rows] - y_NG[rows].mean(0)
    left, singular, right = np.linalg.svd(z, full_matrices=False)
    projected = left.T @ centred
    return [
        RidgeModel(mean, std, right.T @ (projected * (singular / (singular**2 + alpha))[:, None]), intercept, alpha)
        for alpha in ALPHAS
    ]
