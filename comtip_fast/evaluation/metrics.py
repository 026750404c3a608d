"""Scores of a prediction: PCC and partial PCC per gene and their means; undefined correlations count as 0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from comtip_fast.metrics import mean_with_zeros, pcc_per_gene


def covariate_basis(covariates_NC: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis (N, at most C + 1) of the constant and the covariates."""
    design = np.column_stack([np.ones(len(covariates_NC)), covariates_NC])
    # An SVD handles collinear covariates, such as a constant colour channel.
    left, singular, _ = np.linalg.svd(design, full_matrices=False)
    basis: np.ndarray = left[:, singular > singular[0] * 1e-10]
    return basis


def residuals(values_NG: np.ndarray, covariates_NC: np.ndarray) -> np.ndarray:
    """Return the residuals of a linear fit of each column on the covariates and a constant, float64 (N, G)."""
    return residuals_of_basis(values_NG, covariate_basis(covariates_NC))


def residuals_of_basis(values_NG: np.ndarray, basis_NK: np.ndarray) -> np.ndarray:
    """Return the residuals of the projection of each column onto an orthonormal basis, float64 (N, G)."""
    values = np.asarray(values_NG, np.float64)
    residual = values - basis_NK @ (basis_NK.T @ values)
    # A fully explained column leaves rounding noise: set it to 0, so that its PCC is undefined.
    explained = np.sqrt((residual**2).sum(0)) <= 1e-8 * np.sqrt((values**2).sum(0))
    residual[:, explained] = 0.0
    return residual


def partial_pcc_per_gene(measured_NG: np.ndarray, predicted_NG: np.ndarray, covariates_NC: np.ndarray) -> np.ndarray:
    """Return the correlation of each gene's residuals on the covariates, float64 (G,); NaN where undefined."""
    return pcc_per_gene(residuals(measured_NG, covariates_NC), residuals(predicted_NG, covariates_NC))


@dataclass(frozen=True)
class Score:
    """Scores of one predictor on one section under one normalisation; None without genes."""

    mean_pcc_50_hvg: float | None
    mean_pcc_all: float | None
    partial_pcc_50_hvg: float | None
    undefined_genes: int
    """Number of genes whose PCC is undefined; the means count them as 0."""


def score(
    measured_NG: np.ndarray,
    predicted_NG: np.ndarray,
    covariates_NC: np.ndarray,
    hvg: np.ndarray,
    panel: np.ndarray | None = None,
) -> Score:
    """Score a prediction.

    Parameters
    ----------
    measured_NG, predicted_NG
        Spots x genes.
    covariates_NC
        Mean colour and log total counts of each spot.
    hvg
        Columns of the (at most 50) most variable genes.
    panel
        Columns of the genes of ``mean_pcc_all``; default: all.
    """
    pcc = pcc_per_gene(measured_NG, predicted_NG)
    partial = partial_pcc_per_gene(measured_NG[:, hvg], predicted_NG[:, hvg], covariates_NC)
    return score_from_genes(pcc, partial, hvg, panel)


def score_from_genes(
    pcc_G: np.ndarray, partial_H: np.ndarray, hvg: np.ndarray, panel: np.ndarray | None = None
) -> Score:
    """Return the score from correlations per gene; ``partial_H`` has the partial correlations of ``hvg``."""
    return Score(
        mean_pcc_50_hvg=mean_with_zeros(pcc_G[hvg]),
        mean_pcc_all=mean_with_zeros(pcc_G if panel is None else pcc_G[panel]),
        partial_pcc_50_hvg=mean_with_zeros(partial_H),
        undefined_genes=int(np.isnan(pcc_G).sum()),
    )
