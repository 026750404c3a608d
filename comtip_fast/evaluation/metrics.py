"""Scores of a prediction: PCC and partial PCC per gene, and their means, in which undefined correlations count as 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from comtip_fast.metrics import GENES_AT_ONCE, mean_with_zeros, pcc_per_gene

PredictGenes = Callable[[np.ndarray], np.ndarray]
"""Function that returns the prediction (N, g) of the genes in the given columns, int64 (g,)."""


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
    """Return each column minus its projection onto an orthonormal basis, float64 (N, G); 0 for a fully explained column."""
    values = np.asarray(values_NG, np.float64)
    residual = values - basis_NK @ (basis_NK.T @ values)
    # A fully explained column leaves rounding noise: set it to 0, so that its PCC is undefined.
    explained = np.sqrt((residual**2).sum(0)) <= 1e-8 * np.sqrt((values**2).sum(0))
    residual[:, explained] = 0.0
    return residual


def partial_pcc_per_gene(measured_NG: np.ndarray, predicted_NG: np.ndarray, covariates_NC: np.ndarray) -> np.ndarray:
    """Return the PCC of each gene after regressing out the covariates on both sides, float64 (G,); NaN where undefined."""
    basis, columns = covariate_basis(covariates_NC), range(0, measured_NG.shape[1], GENES_AT_ONCE)
    parts = [slice(i, i + GENES_AT_ONCE) for i in columns]
    return np.concatenate(
        [np.zeros(0)]
        + [
            pcc_per_gene(residuals_of_basis(measured_NG[:, p], basis), residuals_of_basis(predicted_NG[:, p], basis))
            for p in parts
        ]
    )


@dataclass(frozen=True)
class Score:
    """Scores of one predictor on one section under one normalisation; a mean without genes is None."""

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
    """Score the predicted against the measured expression by correlation over spots (PCC) per gene, averaged over genes.

    Parameters
    ----------
    measured_NG, predicted_NG
        Measured and predicted expression, spots x genes.
    covariates_NC
        Mean colour and log total counts of each spot, which are regressed out of both sides for the partial PCC.
    hvg
        Columns of the (at most 50) most variable genes.
    panel
        Columns of the genes that ``mean_pcc_all`` averages; default: all.
    """
    columns = np.arange(measured_NG.shape[1])
    return score_columns(measured_NG, lambda c: predicted_NG[:, c], covariates_NC, columns, hvg, panel)


def score_columns(
    measured_NG: np.ndarray,
    predict: PredictGenes,
    covariates_NC: np.ndarray,
    columns: np.ndarray,
    hvg: np.ndarray,
    panel: np.ndarray | None = None,
) -> Score:
    """Score the genes ``columns`` as :func:`score` does, with a prediction that is computed for some genes at a time.

    Parameters
    ----------
    measured_NG, covariates_NC
        As for :func:`score`.
    predict
        Returns the prediction of some columns of ``measured_NG``.
    columns
        int64, the scored columns.
    hvg, panel
        As for :func:`score`, but as indices into ``columns``.
    """
    parts = [columns[i : i + GENES_AT_ONCE] for i in range(0, columns.size, GENES_AT_ONCE)]
    pcc = np.concatenate([np.zeros(0)] + [pcc_per_gene(measured_NG[:, c], predict(c)) for c in parts])
    top = columns[hvg]
    partial = partial_pcc_per_gene(measured_NG[:, top], predict(top), covariates_NC)
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


def null_scores(scores: list[Score], observed: float | None) -> tuple[dict[str, Any], np.ndarray]:
    """Summarise the scores of the draws of the spatial null.

    Parameters
    ----------
    scores
        Score of each draw.
    observed
        ``mean_pcc_50_hvg`` of the model; None without genes.

    Returns
    -------
    summary, draws
        ``summary`` has the mean scores, the 95th percentile of ``mean_pcc_50_hvg`` (``p95_mean_pcc_50_hvg``) and the one-sided
        ``p_value`` of ``observed``; the last two are None without draws or genes. ``draws`` has ``mean_pcc_50_hvg`` of each draw.
    """
    draws = np.array([s.mean_pcc_50_hvg for s in scores if s.mean_pcc_50_hvg is not None])
    summary = mean_scores([asdict(s) for s in scores]) | {
        "p95_mean_pcc_50_hvg": float(np.quantile(draws, 0.95)) if draws.size else None,
        "p_value": float((1 + (draws >= observed).sum()) / (1 + draws.size))
        if draws.size and observed is not None
        else None,
    }
    return summary, draws


def mean_scores(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of each field of :class:`Score` over the scores in which it is not None; None if it is None in all.

    ``undefined_genes`` is rounded to an integer, and is 0 without scores.
    """
    out: dict[str, Any] = {}
    for key in Score.__dataclass_fields__:
        values = [s[key] for s in scores if s[key] is not None]
        mean = float(np.mean(values)) if values else None
        out[key] = round(mean or 0.0) if key == "undefined_genes" else mean
    return out
