"""Ridge regression from spot features to expression, for the supervised baselines."""

from __future__ import annotations

from collections.abc import Sequence
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
        Fold of each spot in the cross-validation, see :func:`comtip_fast.evaluation.folds.ridge_folds`; default: one fold per
        section, or every fifth spot if there is one section, for spots without positions.

    Raises
    ------
    ValueError
        There are fewer than 10 training spots.
    """
    return fit_ridges(x_NF, [y_NG], section_N, fold_N)[0]


def fit_ridges(
    x_NF: np.ndarray, targets: Sequence[np.ndarray], section_N: np.ndarray, fold_N: np.ndarray | None = None
) -> list[RidgeModel]:
    """Fit several sets of targets, each as :func:`fit_ridge` does, with one decomposition of the inputs per fold for all sets.

    Parameters and errors are those of :func:`fit_ridge`; ``targets`` has arrays (N, G), with an own alpha each. An item is read once
    per fold and once at the end, so that a sequence that computes its items need not hold them.
    """
    if len(x_NF) < 10:
        raise ValueError(f"ridge needs at least 10 training spots, but there are {len(x_NF)}; add training sections")
    x_NF = np.asarray(x_NF, np.float64)
    sections = np.unique(section_N)
    if fold_N is None:
        fold_N = section_N if sections.size > 1 else np.arange(len(x_NF)) % FOLDS
    folds = np.unique(fold_N)
    total = np.zeros((len(targets), len(ALPHAS)))
    for fold in folds:
        held_out = fold_N == fold
        inputs = _Inputs(x_NF[~held_out], section_N[~held_out])
        rotated = inputs.rotated(x_NF[held_out])
        for i in range(len(targets)):
            y = np.asarray(targets[i], np.float64)
            projected, intercept = inputs.projected(y[~held_out]), y[~held_out].mean(0)
            # Cross-validation uses the evaluation's score: correlation within a section.
            total[i] += [
                mean_pcc(y[held_out], rotated @ (projected * inputs.shrinkage(a)[:, None]) + intercept) for a in ALPHAS
            ]
    inputs, best = _Inputs(x_NF, section_N), total.argmax(1)
    return [
        replace(inputs.fit(np.asarray(targets[i], np.float64), ALPHAS[k]), cv_pcc=float(total[i, k] / folds.size))
        for i, k in enumerate(best.tolist())
    ]


class _Inputs:
    """Standardised inputs of N spots and their singular value decomposition, which every alpha and set of targets shares."""

    def __init__(self, x_NF: np.ndarray, section_N: np.ndarray) -> None:
        self.mean, std = x_NF.mean(0), x_NF.std(0)
        self.std = np.where(std > 1e-12, std, 1.0)
        self.left, self.singular, self.right = np.linalg.svd((x_NF - self.mean) / self.std, full_matrices=False)
        self.rows = [section_N == s for s in np.unique(section_N)]

    def shrinkage(self, alpha: float) -> np.ndarray:
        """Return the factor of each singular direction, float64 (R,)."""
        factor: np.ndarray = self.singular / (self.singular**2 + alpha)
        return factor

    def projected(self, y_NG: np.ndarray) -> np.ndarray:
        """Return targets, centred within each section, projected onto the singular directions, float64 (R, G)."""
        centred = np.empty_like(y_NG)
        for rows in self.rows:
            centred[rows] = y_NG[rows] - y_NG[rows].mean(0)
        out: np.ndarray = self.left.T @ centred
        return out

    def rotated(self, x_MF: np.ndarray) -> np.ndarray:
        """Return other inputs in singular directions, float64 (M, R)."""
        out: np.ndarray = ((x_MF - self.mean) / self.std) @ self.right.T
        return out

    def fit(self, y_NG: np.ndarray, alpha: float) -> RidgeModel:
        """Return the model of one alpha."""
        weight = self.right.T @ (self.projected(y_NG) * self.shrinkage(alpha)[:, None])
        return RidgeModel(self.mean, self.std, weight, y_NG.mean(0), alpha)
