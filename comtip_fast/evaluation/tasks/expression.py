"""Tasks on expression: the linear probe next to the zero-shot prediction, and scores of gene sets."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np
from comtip_shards.sampling.rng import generator

from comtip_fast.evaluation.baselines import fit_ridges
from comtip_fast.evaluation.folds import ridge_folds
from comtip_fast.evaluation.nulls import moved_spots
from comtip_fast.evaluation.tasks.context import COLOUR, ENCODER, SectionInputs, TaskContext
from comtip_fast.evaluation.tasks.gene_sets import members, set_scores
from comtip_fast.evaluation.tasks.intervals import NO_INTERVAL, interval, section_interval, weighted_pcc
from comtip_fast.evaluation.tasks.rows import NAN, TaskRow
from comtip_fast.evaluation.trained import LABELS
from comtip_fast.genes.families import MIN_GENES
from comtip_fast.metrics import mean_pcc, pcc_per_gene

log = logging.getLogger("comtip_fast")
ZERO_SHOT, MEAN = "comtip zero-shot", "mean of training"
COMPARED = (ZERO_SHOT, MEAN, f"ridge, {ENCODER}", f"ridge, {COLOUR}")
"""Methods of the task ``probe`` whose rows are listed together with those of a trained method."""
VARIABLE, UNSEEN = "50", "unseen"
"""Suffixes of metric names: for the most variable genes, and for genes that were held out from training."""
FITTED = "_fitted"
"""Suffix of metric names: only for the genes or gene sets that at least 10 training spots measured, if these are not all."""
MIN_SPOTS = 10
"""Smallest number of training spots for a ridge regression."""


def probe_rows(context: TaskContext) -> list[TaskRow]:
    """Score ridge regression on the features of each encoder, the zero-shot prediction and the mean of the training spots.

    Targets are the 50 most variable genes, log1p CP10K. Scores are the mean PCC, with undefined correlations as 0, and the mean
    squared error. Up to 50 genes that were held out from training the model are scored too (``pcc_unseen``), next to ridge
    regressions that are trained on these genes. The control of a ridge regression is the mean of 20 of the same regressions on
    targets that are shuffled within sections; the control of the zero-shot prediction is the spatial null. Cohorts with fewer than 10
    training spots have zero-shot scores only. A section that measured none of the genes has no rows.
    """
    rows = [row for section in context.sections for row in _probe_of(context, section)]
    return [*rows, *mean_rows(rows, context)]


def trained_rows(context: TaskContext, name: str) -> list[TaskRow]:
    """Score a trained method on the genes of :func:`probe_rows`, and add the rows of :data:`COMPARED` for comparison.

    The control is the spatial null of the predictions. A cohort without training sections has no row.
    """
    rows = []
    for section in context.sections:
        keys, method = context.most_variable(section.cohort, section.number), context.trained(name)
        if not keys:
            _left_out(name, section, "most variable genes")
        elif section.cohort in method.cohorts:
            measured = context.values(section, keys)
            found = method.predict(*context.tiles(section), section.cohort, keys)
            train = context.train_sections(section.cohort)
            fitted = _fitted(train, context.train_measured(train, keys)) & np.isfinite(found).all(0)
            genes = VARIABLE if fitted.all() else VARIABLE + FITTED
            if fitted.any():
                measured, found = measured[:, fitted], found[:, fitted]
                null = _null(context, section, measured, found)
                rows += _expression_rows(section, LABELS[name], measured, found, null, task=name, genes=genes)
            compared = [r for r in _probe_of(context, section) if r.method in COMPARED and UNSEEN not in r.metric]
            rows += [replace(r, task=name) for r in compared]
    return [*rows, *mean_rows(rows, context)]


def _probe_of(context: TaskContext, section: SectionInputs) -> list[TaskRow]:
    """Return the rows of ``probe`` for a section, computed once for all tasks."""
    if section.number not in context.probes:
        keys, unseen = context.most_variable(section.cohort, section.number), context.unseen(section)
        if not keys:
            _left_out("probe", section, "most variable genes")
        rows = _probe_section(context, section, keys, tuple(section.features)) if keys else []
        if unseen:
            rows += _probe_section(context, section, unseen, (ENCODER, COLOUR), UNSEEN)
        context.probes[section.number] = rows
    return context.probes[section.number]


def _left_out(task: str, section: SectionInputs, genes: str) -> None:
    """Warn that a section measured too few genes for a task."""
    log.warning("%s: section %s is left out: it measured none of the %s", task, section.section_id, genes)


def _probe_section(
    context: TaskContext, section: SectionInputs, keys: list[str], encoders: Sequence[str], genes: str = VARIABLE
) -> list[TaskRow]:
    """Return rows of the zero-shot prediction and, with 10 or more training spots, of the training mean and ridge per encoder.

    If fewer than 10 training spots measured some of the genes, the training mean and ridge are scored on the others, and the zero-shot
    prediction on these too, in rows whose metric ends with :data:`FITTED`.
    """
    measured = context.values(section, keys)
    zero_shot = context.predictor.predict(section.image, context.queries(keys), cohort=section.cohort)["cp10k"]
    null = _null(context, section, measured, zero_shot)
    rows = _expression_rows(section, ZERO_SHOT, measured, zero_shot, null, genes=genes)
    train = context.train_sections(section.cohort)
    if sum(len(t.spot_ids) for t in train) < MIN_SPOTS:
        return rows
    values = np.concatenate([context.train_values(t, keys) for t in train])
    known = context.train_measured(train, keys)
    fitted = _fitted(train, known)
    if not fitted.any():
        return rows
    if not fitted.all():
        genes = f"{genes}{FITTED}"
        measured, zero_shot, values, known = (v[:, fitted] for v in (measured, zero_shot, values, known))
        null = _null(context, section, measured, zero_shot)
        rows += _expression_rows(section, ZERO_SHOT, measured, zero_shot, null, genes=genes)
    known_NG = np.repeat(known, [len(t.spot_ids) for t in train], axis=0)
    mean = np.broadcast_to((values * known_NG).sum(0) / np.maximum(known_NG.sum(0), 1), measured.shape)
    rows += _expression_rows(section, MEAN, measured, mean, NAN, genes=genes)
    for name in encoders:
        found, control = _with_control(
            train,
            name,
            values,
            known,
            section.features[name],
            measured,
            context.options.n_null,
            context.options.seed,
        )
        rows += _expression_rows(section, f"ridge, {name}", measured, found, control, genes=genes)
    return rows


def _fitted(train: list[SectionInputs], known_SG: np.ndarray) -> np.ndarray:
    """Return which targets at least 10 training spots measured, bool (G,)."""
    n_S = np.array([len(t.spot_ids) for t in train])
    fitted: np.ndarray = (n_S[:, None] * known_SG).sum(0) >= MIN_SPOTS
    return fitted


def _predicted(
    train: list[SectionInputs], name: str, y_NG: np.ndarray, known_SG: np.ndarray, x_new_MF: np.ndarray
) -> np.ndarray:
    """Return predictions (M, G) of ridge regression on the training sections.

    A target is fitted to the sections that measured it (``known_SG``); one that fewer than 10 training spots measured is predicted as 0.
    """
    out = np.zeros((len(x_new_MF), y_NG.shape[1]))
    for columns, (found,) in _fits(train, name, y_NG, known_SG, x_new_MF, 0, 0):
        out[:, columns] = found
    return out


def _with_control(
    train: list[SectionInputs],
    name: str,
    y_NG: np.ndarray,
    known_SG: np.ndarray,
    x_new_MF: np.ndarray,
    measured_MG: np.ndarray,
    n_draws: int,
    seed: int,
) -> tuple[np.ndarray, float]:
    """Return the predictions of :func:`_predicted`, and the mean PCC of its control over ``n_draws`` draws; NaN without draws.

    In a draw, the same regression, with its own penalty, is fitted to targets that are shuffled within each section.
    """
    out, pcc = np.zeros(measured_MG.shape), np.zeros((n_draws, y_NG.shape[1]))
    for columns, found in _fits(train, name, y_NG, known_SG, x_new_MF, n_draws, seed):
        out[:, columns] = next(found)
        for draw, control in enumerate(found):
            pcc[draw, columns] = np.nan_to_num(pcc_per_gene(measured_MG[:, columns], control))
    return out, float(pcc.mean()) if n_draws else NAN


def _fits(
    train: list[SectionInputs],
    name: str,
    y_NG: np.ndarray,
    known_SG: np.ndarray,
    x_new_MF: np.ndarray,
    n_draws: int,
    seed: int,
) -> Iterator[tuple[np.ndarray, Iterator[np.ndarray]]]:
    """Yield, for each group of targets that the same sections measured, its columns and its predictions, then those of the draws."""
    parts = [np.asarray(t.features[name], np.float64) for t in train]
    x_NF, x_new = np.concatenate(parts), np.asarray(x_new_MF, np.float64)
    number_N = np.concatenate([np.full(len(p), i) for i, p in enumerate(parts)])
    xy_N2 = np.concatenate([t.xy_N2 for t in train])
    for sections in np.unique(known_SG, axis=1).T:
        columns = np.flatnonzero((sections == known_SG.T).all(1))
        spots = np.isin(number_N, np.flatnonzero(sections))
        if spots.sum() >= MIN_SPOTS:
            targets = _Shuffled(y_NG[spots][:, columns], number_N[spots], n_draws, seed, name)
            fold = ridge_folds(number_N[spots], xy_N2[spots])
            models = fit_ridges(x_NF[spots], targets, number_N[spots], fold)
            yield columns, (model.predict(x_new) for model in models)


class _Shuffled(Sequence[np.ndarray]):
    """Targets (N, G), followed by ``n_draws`` copies whose spots are shuffled within each section; a copy exists while it is used."""

    def __init__(self, y_NG: np.ndarray, section_N: np.ndarray, n_draws: int, seed: int, name: str) -> None:
        self._y, self._n, self._key = y_NG, n_draws, (seed, "shuffled-probe", name)
        self._rows = [np.flatnonzero(section_N == s) for s in np.unique(section_N)]

    def __len__(self) -> int:
        return 1 + self._n

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index == 0:
            return self._y
        rng, order = generator(*self._key, index), np.empty(len(self._y), np.int64)
        for rows in self._rows:
            order[rows] = rng.permutation(rows)
        shuffled: np.ndarray = self._y[order]
        return shuffled


def _null(context: TaskContext, section: SectionInputs, measured: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean PCC of rotated and shifted predictions, averaged over draws; NaN without draws."""
    draws = moved_spots(section.xy_N2, context.options.n_null, seed=context.options.seed, section=section.section_id)
    return float(np.mean([mean_pcc(measured, predicted[d]) for d in draws])) if len(draws) else NAN


def _expression_rows(
    section: SectionInputs,
    method: str,
    measured: np.ndarray,
    predicted: np.ndarray,
    shuffled: float,
    task: str = "probe",
    genes: str = VARIABLE,
) -> list[TaskRow]:
    """Return the rows of PCC and mean squared error of one method, with intervals over spatial blocks."""
    weights = section.weights_DN
    pcc = interval(weighted_pcc(measured, predicted, weights).mean(1)) if len(weights) else NO_INTERVAL
    squared = ((measured - predicted) ** 2).mean(1)
    mse = interval(weights @ squared / weights.sum(1)) if len(weights) else NO_INTERVAL
    own: dict[str, Any] = {"task": task, "section": section.section_id, "method": method, "n": len(measured)}
    return [
        TaskRow(
            metric=f"pcc_{genes}",
            value=mean_pcc(measured, predicted),
            low=pcc[0],
            high=pcc[1],
            chance=0.0,
            shuffled=shuffled,
            **own,
        ),
        TaskRow(metric=f"mse_{genes}", value=float(squared.mean()), low=mse[0], high=mse[1], **own),
    ]


def mean_rows(rows: list[TaskRow], context: TaskContext) -> list[TaskRow]:
    """Return a row for each task, cohort, method and metric with several sections: the mean over sections, with an interval.

    Sections of different cohorts are not averaged: a mean over organs or species is that of no tissue.
    """
    cohort_of = {s.section_id: s.cohort for s in context.sections}
    several = len(set(cohort_of.values())) > 1
    groups: dict[tuple[str, str, str, str], list[TaskRow]] = {}
    for row in rows:
        groups.setdefault((row.task, cohort_of[row.section], row.method, row.metric), []).append(row)
    out = []
    for (task, cohort, method, metric), own in groups.items():
        if len(own) > 1:
            values = np.array([r.value for r in own])
            low, high = section_interval(values, context.options.n_bootstrap, seed=context.options.seed)
            chance, shuffled = (float(np.mean([getattr(r, k) for r in own])) for k in ("chance", "shuffled"))
            name = f"mean of {len(own)} sections" + (f" of {cohort}" if several else "")
            out.append(TaskRow(task, name, method, metric, float(values.mean()), low, high, chance, shuffled, len(own)))
    return out


def pathway_rows(context: TaskContext) -> list[TaskRow]:
    """Compare predicted with measured scores of gene sets, for each set and averaged over the sets.

    The score of a set in a spot is the mean of its genes, each standardised over the section's spots. Baselines are ridge
    regressions from features to the scores of the training sections. A set is learnt from the sections that measured at least three of
    its genes, if these have at least 10 spots. If a set is not learnt, the mean over the others is ``mean_pcc_fitted``.
    """
    rows = []
    for section in context.sections:
        keys = sorted(context.measured(section.number))
        sets = members(context.options.gene_sets, keys)
        if sets:
            used = np.unique(np.concatenate(list(sets.values())))
            local = {name: np.searchsorted(used, r) for name, r in sets.items()}
            rows += _pathway_section(context, section, [keys[i] for i in used], local)
        else:
            log.warning(
                "pathways: section %s is left out: it measured fewer than %d genes of every gene set; give sets with genes that it "
                "measured with `gene_sets`",
                section.section_id,
                MIN_GENES,
            )
    return [*rows, *mean_rows([r for r in rows if r.metric.startswith("mean_pcc")], context)]


def _pathway_section(
    context: TaskContext, section: SectionInputs, keys: list[str], sets: dict[str, np.ndarray]
) -> list[TaskRow]:
    """Return the rows of the zero-shot prediction and the ridge baselines for the gene sets of one section."""
    names, members_of = list(sets), list(sets.values())
    measured = set_scores(context.values(section, keys), members_of)
    predicted = context.predictor.predict(section.image, context.queries(keys), cohort=section.cohort)["cp10k"]
    found = {ZERO_SHOT: set_scores(predicted, members_of)}
    train = context.train_sections(section.cohort)
    rows = _set_rows(context, section, ZERO_SHOT, names, measured, found[ZERO_SHOT])
    if not train:
        return rows
    y, known = _train_set_scores(context, train, keys, members_of)
    fitted = np.flatnonzero(_fitted(train, known))
    if not fitted.size:
        return rows
    for name, features in section.features.items():
        found[f"ridge, {name}"] = _predicted(train, name, y, known, features)
    suffix = "" if fitted.size == len(names) else FITTED
    own = [names[i] for i in fitted]
    for method, scores in found.items():
        of_method = _set_rows(context, section, method, own, measured[:, fitted], scores[:, fitted], suffix)
        if method != ZERO_SHOT:
            rows += of_method
        elif suffix:
            rows += of_method[:1]
    return rows


def _train_set_scores(
    context: TaskContext, train: list[SectionInputs], keys: list[str], members_of: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of gene sets in all training spots, (N, S), and which sections they are known in, bool (sections, S).

    A score is the mean over the genes that the section measured. With fewer than three of them it is unknown, and 0.
    """
    measured = context.train_measured(train, keys)
    known = np.array([[own[r].sum() >= MIN_GENES for r in members_of] for own in measured], bool)
    parts = []
    for section, own, of_section in zip(train, measured, known, strict=True):
        out = np.zeros((len(section.spot_ids), len(members_of)))
        rows = [r[own[r]] for r, there in zip(members_of, of_section, strict=True) if there]
        out[:, of_section] = set_scores(context.train_values(section, keys), rows)
        parts.append(out)
    return np.concatenate(parts), known


def _set_rows(
    context: TaskContext,
    section: SectionInputs,
    method: str,
    names: list[str],
    measured: np.ndarray,
    scores: np.ndarray,
    suffix: str = "",
) -> list[TaskRow]:
    """Return the row of the mean PCC over gene sets, whose metric ends with ``suffix``, and one row per set."""
    pcc = np.nan_to_num(pcc_per_gene(measured, scores))
    weights, draws = (
        section.weights_DN,
        moved_spots(section.xy_N2, context.options.n_null, seed=context.options.seed, section=section.section_id),
    )
    null = np.array([np.nan_to_num(pcc_per_gene(measured, scores[d])) for d in draws])
    resampled = weighted_pcc(measured, scores, weights) if len(weights) else np.zeros((0, len(names)))
    own: dict[str, Any] = {"task": "pathways", "section": section.section_id, "method": method, "chance": 0.0}
    low, high = interval(resampled.mean(1)) if len(resampled) else NO_INTERVAL
    mean_null = float(null.mean()) if null.size else NAN
    rows = [
        TaskRow(
            metric=f"mean_pcc{suffix}",
            value=float(pcc.mean()),
            low=low,
            high=high,
            shuffled=mean_null,
            n=len(names),
            **own,
        )
    ]
    for i, name in enumerate(names):
        low, high = interval(resampled[:, i])
        control = float(null[:, i].mean()) if null.size else NAN
        rows.append(
            TaskRow(
                metric=f"pcc {name}", value=float(pcc[i]), low=low, high=high, shuffled=control, n=len(measured), **own
            )
        )
    return rows
