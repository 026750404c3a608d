"""Scores of one section: the model and its references, the spatial null, ridge baselines and trained methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from comtip_fast.evaluation.gene_table import ScoringInputs
from comtip_fast.evaluation.metrics import (
    PredictGenes,
    null_scores,
    partial_pcc_per_gene,
    score_columns,
    score_from_genes,
)
from comtip_fast.evaluation.nulls import null_partial_pcc, null_pcc
from comtip_fast.evaluation.train_reference import RidgeFit, TrainReference
from comtip_fast.evaluation.unseen import MEAN_MAP, NAMES, VECTORS
from comtip_fast.inference import GeneQuery, Predictor, SectionFeatures
from comtip_fast.inference.feature_store import FeatureStore
from comtip_fast.metrics import pcc_per_gene

N_HVG = 50
NORMALISATIONS = ("cp10k", "raw")
UNSEEN, UNSEEN_RIDGE = "zero_shot_unseen_genes", "unseen_ridge"
PREDICTORS = (
    "zero_shot",
    "zero_shot_levels",
    UNSEEN,
    MEAN_MAP,
    NAMES,
    VECTORS,
    UNSEEN_RIDGE,
    "control_null",
    "ridge_colour",
    "ridge_features",
    "ridge_frozen",
)
CEILING = ("ridge_features", "ridge_frozen")
"""Baselines from whose inputs the ridge regression that is trained on the unseen genes (:data:`UNSEEN_RIDGE`) is chosen."""


def levels_pcc(
    predictor: Predictor,
    features: SectionFeatures,
    queries: Sequence[GeneQuery],
    measured: dict[str, np.ndarray],
    hvg: np.ndarray,
    covariates: np.ndarray,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return :attr:`ScoringInputs.from_levels`; only the predictions of some genes are in memory at a time."""
    out = {norm: (np.full(len(queries), np.nan), np.full(hvg.size, np.nan)) for norm in NORMALISATIONS}
    start = 0
    for levels in predictor.sentence_levels(queries):
        values = features.predict_levels(levels)
        stop = start + values["cp10k"].shape[1]
        own = np.flatnonzero((hvg >= start) & (hvg < stop))
        for norm, (pcc, adjusted) in out.items():
            part = measured[norm][:, start:stop]
            pcc[start:stop] = pcc_per_gene(part, values[norm])
            columns = hvg[own] - start
            adjusted[own] = partial_pcc_per_gene(part[:, columns], values[norm][:, columns], covariates)
        start = stop
    return out


def score_section(v: ScoringInputs, reference: TrainReference) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Return all scores and, for the null on CP10K values, the mean PCC of each draw and the PCC of the panel genes per draw."""
    out: dict[str, Any] = {name: dict.fromkeys(NORMALISATIONS) for name in PREDICTORS}
    genes, null = v.genes, (np.zeros(0), np.zeros((0, 0), np.float32))
    scored = np.union1d(genes.panel, genes.hvg)  # some of the most variable genes may be held out
    top, panel = np.searchsorted(scored, genes.hvg), np.searchsorted(scored, genes.panel)
    first_unseen = np.arange(min(N_HVG, genes.unseen.size))
    keys = [genes.keys[i] for i in scored]
    for name, of_norm in v.unseen_references.items():
        out[name] = of_norm
    for norm in NORMALISATIONS:
        m, p = v.measured[norm], v.predicted[norm]
        zero_shot = score_columns(m, partial(_columns, p), v.covariates, scored, top, panel)
        out["zero_shot"][norm] = asdict(zero_shot)
        levels_pcc, levels_partial = v.from_levels[norm]
        out["zero_shot_levels"][norm] = asdict(score_from_genes(levels_pcc[scored], levels_partial, top, panel))
        unseen = score_columns(m, partial(_columns, p), v.covariates, genes.unseen, first_unseen)
        out[UNSEEN][norm] = asdict(unseen)
        out[UNSEEN_RIDGE][norm] = _unseen_ridge(v, reference, norm, keys, asdict(unseen))
        pcc = v.null[:, scored] if norm == "cp10k" else null_pcc(m, p, v.moved, scored)
        partial_null = null_partial_pcc(m[:, genes.hvg], p[:, genes.hvg], v.covariates, v.moved)
        out["control_null"][norm], draws = null_scores(
            [score_from_genes(g, h, top, panel) for g, h in zip(pcc, partial_null, strict=True)],
            zero_shot.mean_pcc_50_hvg,
        )
        if norm == "cp10k":
            null = (draws, pcc[:, panel].astype(np.float32))
        for name, x in v.ridge_inputs.items():
            fit = reference.ridge(v.cohort, name, norm, keys)
            found = None if fit is None else _ridge_score(fit, x, v, norm, scored, top, panel, asdict(zero_shot))
            out[name][norm] = found
            if fit is not None and found is not None and norm == "cp10k":
                v.baselines[name] = fit.predict(x, len(m), top)
    for name, values in v.trained.items():
        predict, known = partial(_columns, values), np.flatnonzero(np.isfinite(values[:, scored]).all(0))
        found = _known_score(v, "cp10k", predict, known, scored, top, panel, out["zero_shot"]["cp10k"])
        out[name] = {"cp10k": found, "raw": None}
        if found is not None:
            v.baselines[name] = values[:, genes.hvg]
    return out, *null


def _unseen_ridge(
    v: ScoringInputs, reference: TrainReference, norm: str, keys: list[str], of_model: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the scores of the unseen genes by ridge regression that is trained on them; None if no training section measured one.

    The inputs are those of one of :data:`CEILING`, chosen by cross-validation on the training sections. The fits of the other scored
    genes, ``keys``, share its decomposition. ``of_model`` has the model's scores on the unseen genes.
    """
    columns, first = np.sort(v.genes.unseen), v.genes.unseen[:N_HVG]
    unseen = [v.genes.keys[i] for i in columns]
    found: list[tuple[RidgeFit, dict[str, FeatureStore]]] = []
    for name in CEILING if unseen else ():
        if name in v.ridge_inputs:
            reference.fit(v.cohort, name, norm, [keys, unseen])
            fit = reference.ridge(v.cohort, name, norm, unseen)
            found += [] if fit is None else [(fit, v.ridge_inputs[name])]
    if not found:
        return None
    fit, x = max(found, key=lambda one: one[0].cv_pcc)
    top = np.searchsorted(columns, first)
    scores = _ridge_score(fit, x, v, norm, columns, top, np.arange(columns.size), of_model)
    if norm == "cp10k" and scores is not None:
        v.unseen_baselines[UNSEEN_RIDGE] = fit.predict(x, len(v.measured[norm]), top)
    return scores


def _columns(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return values[:, columns]


def _ridge_score(
    fit: RidgeFit,
    x: dict[str, FeatureStore],
    v: ScoringInputs,
    norm: str,
    scored: np.ndarray,
    top: np.ndarray,
    panel: np.ndarray,
    of_model: dict[str, Any],
) -> dict[str, Any] | None:
    """Return :func:`_known_score` of a ridge baseline of the genes ``scored`` (ascending), with the facts of the fit."""

    def predict(columns: np.ndarray) -> np.ndarray:
        return fit.predict(x, len(v.measured[norm]), np.searchsorted(scored, columns))

    found = _known_score(v, norm, predict, fit.fitted, scored, top, panel, of_model)
    return None if found is None else found | fit.facts()


def _known_score(
    v: ScoringInputs,
    norm: str,
    predict: PredictGenes,
    known: np.ndarray,
    scored: np.ndarray,
    top: np.ndarray,
    panel: np.ndarray,
    of_model: dict[str, Any],
) -> dict[str, Any] | None:
    """Score a trained method on the genes that its training sections measured, and the model on the same genes.

    A gene without training values is no failure of the method, so it is left out of the means and not counted as 0.

    Parameters
    ----------
    v, norm
        Inputs and normalisation.
    predict
        Returns the method's prediction of some columns of the measured expression.
    known
        Indices into ``scored`` of the genes that the method was trained on, ascending.
    scored, top, panel
        As ``columns``, ``hvg`` and ``panel`` of :func:`comtip_fast.evaluation.metrics.score_columns`.
    of_model
        The model's scores on all genes ``scored``.

    Returns
    -------
    dict or None
        Fields of :class:`comtip_fast.evaluation.metrics.Score`, the numbers of genes ``genes``, ``fitted_genes`` and
        ``fitted_50_hvg``, and the model's scores on the fitted genes, ``model_on_fitted``. None if no gene is known.
    """
    if not known.size:
        return None
    columns = scored[known]
    own_top, own_panel = (np.searchsorted(known, part[np.isin(part, known)]) for part in (top, panel))
    measured, predicted = v.measured[norm], v.predicted[norm]
    found = score_columns(measured, predict, v.covariates, columns, own_top, own_panel)
    if known.size < scored.size:
        of_model = asdict(
            score_columns(measured, partial(_columns, predicted), v.covariates, columns, own_top, own_panel)
        )
    counts = {"genes": int(scored.size), "fitted_genes": int(known.size), "fitted_50_hvg": int(own_top.size)}
    return asdict(found) | counts | {"model_on_fitted": of_model}
