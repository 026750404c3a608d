"""Correlations per gene, with what is undefined counted and never dropped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EPSILON = 1e-10


def pcc_per_gene(measured_NG: np.ndarray, predicted_NG: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation over spots for each gene, float64 (G,); NaN where either side is constant."""
    a = np.asarray(measured_NG, np.float64)
    b = np.asarray(predicted_NG, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"measured is {a.shape}, predicted is {b.shape}")
    a, b = a - a.mean(0), b - b.mean(0)
    norm_a, norm_b = np.sqrt((a * a).sum(0)), np.sqrt((b * b).sum(0))
    # A constant column is not exactly 0 after its mean is taken out; its norm is tiny beside its own values.
    scale_a = np.sqrt((np.asarray(measured_NG, np.float64) ** 2).sum(0))
    scale_b = np.sqrt((np.asarray(predicted_NG, np.float64) ** 2).sum(0))
    defined = (norm_a > EPSILON * scale_a) & (norm_b > EPSILON * scale_b)
    out = np.full(a.shape[1], np.nan)
    out[defined] = (a * b).sum(0)[defined] / (norm_a * norm_b)[defined]
    return out


def covariate_basis(covariates_NC: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis (N, at most C + 1) of a constant and the covariates."""
    design = np.column_stack([np.ones(len(covariates_NC)), covariates_NC])
    # An orthonormal basis makes collinear covariates (a constant colour channel) harmless.
    left, size, _ = np.linalg.svd(design, full_matrices=False)
    basis: np.ndarray = left[:, size > size[0] * 1e-10]
    return basis


def residuals(values_NG: np.ndarray, covariates_NC: np.ndarray) -> np.ndarray:
    """Return what a linear fit on the covariates and a constant leaves of each column."""
    return outside(values_NG, covariate_basis(covariates_NC))


def outside(values_NG: np.ndarray, basis_NK: np.ndarray) -> np.ndarray:
    """Return what an orthonormal basis leaves of each column, float64 (N, G)."""
    values = np.asarray(values_NG, np.float64)
    left_over = values - basis_NK @ (basis_NK.T @ values)
    # A column that the covariates explain whole leaves rounding noise: say 0, so that its PCC is undefined.
    explained = np.sqrt((left_over**2).sum(0)) <= 1e-8 * np.sqrt((values**2).sum(0))
    left_over[:, explained] = 0.0
    return left_over


def partial_pcc_per_gene(measured_NG: np.ndarray, predicted_NG: np.ndarray, covariates_NC: np.ndarray) -> np.ndarray:
    """Return the correlation of what the covariates leave of both sides, float64 (G,)."""
    return pcc_per_gene(residuals(measured_NG, covariates_NC), residuals(predicted_NG, covariates_NC))


def mean_with_zeros(pcc_G: np.ndarray) -> float | None:
    """Return the mean where an undefined correlation counts as 0; None for no gene at all."""
    return float(np.nan_to_num(pcc_G).mean()) if pcc_G.size else None


@dataclass(frozen=True)
class Score:
    """One predictor on one section under one normalisation."""

    mean_pcc_50_hvg: float | None
    mean_pcc_all: float | None
    partial_pcc_50_hvg: float | None
    undefined_genes: int
    """Genes among all that were scored whose correlation is undefined; they count as 0."""


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
        Positions of the (at most 50) most variable genes among the G.
    panel
        Positions of the genes of ``mean_pcc_all``; default all G.
    """
    pcc = pcc_per_gene(measured_NG, predicted_NG)
    partial = partial_pcc_per_gene(measured_NG[:, hvg], predicted_NG[:, hvg], covariates_NC)
    return from_genes(pcc, partial, hvg, panel)


def from_genes(pcc_G: np.ndarray, partial_H: np.ndarray, hvg: np.ndarray, panel: np.ndarray | None = None) -> Score:
    """Return the score of correlations per gene: ``partial_H`` are those of the ``hvg``."""
    everything = pcc_G if panel is None else pcc_G[panel]
    return Score(
        mean_with_zeros(pcc_G[hvg]), mean_with_zeros(everything), mean_with_zeros(partial_H), int(np.isnan(pcc_G).sum())
    )
