"""Intervals over spatial blocks, calibration and clusters, which the report shows next to the scores.

Shapes: N spots, G genes, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from comtip_fast.drawing import calibration_slope, calibration_table
from comtip_fast.evaluation.evaluate import Evaluation, SectionData
from comtip_fast.evaluation.scoring import N_HVG, UNSEEN
from comtip_fast.evaluation.tasks.domains import agreement, cluster, is_labelled
from comtip_fast.evaluation.tasks.intervals import (
    block_weights,
    interval,
    section_interval,
    spatial_blocks,
    weighted_pcc,
)
from comtip_fast.metrics import pcc_per_gene

DRAWS, BLOCKS_PER_SIDE = 500, 6
"""Draws of the bootstrap, and blocks along the longer side of a section."""
INTERVAL_COLUMNS = (
    "section",
    "predictor",
    "mean_pcc",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
    "blocks",
    "genes",
)
"""Columns of ``intervals.csv``."""
RANKED = 8
"""Number of genes in each of the lists of best, median and worst genes."""
MIN_LABELLED, MAX_CLUSTERS = 30, 20
"""Smallest number of labelled spots, and largest number of labels, of a section whose clusters are compared with labels."""


def intervals(data: SectionData, seed: int = 0) -> pd.DataFrame:
    """Return 95 % intervals of the mean PCC over the most variable genes, by a bootstrap over spatial blocks.

    Blocks are drawn with replacement, because neighbouring spots are not independent. The same draws are used for all
    predictors, so that differences are paired.

    Returns
    -------
    DataFrame
        One row for the model (``zero_shot``) and each baseline and trained method: ``section``, ``predictor``, ``mean_pcc``,
        ``low``, ``high``, ``difference`` (mean PCC of the model minus mean PCC of the predictor), ``difference_low``,
        ``difference_high``, ``blocks`` and ``genes``. The ends of the intervals are NaN with fewer than 5 blocks. A method is scored on
        the ``genes`` of them that its training sections measured, and compared with the model on the same genes. A section that
        measured none of these genes has no such rows. If there are unseen genes, rows of the (up to 50) most variable of them follow:
        the model (``zero_shot_unseen_genes``), and the mean map and the ridge regression, whose difference is to the model on these
        genes.
    """
    block = spatial_blocks(data.xy, BLOCKS_PER_SIDE)
    n_blocks = int(block.max()) + 1
    weight = block_weights(block, DRAWS, seed=seed, section=data.section_id)
    groups = [("zero_shot", data.hvg, data.baselines), (UNSEEN, data.unseen[:N_HVG], data.unseen_baselines)]
    rows = []
    for own, columns, others in groups:
        if not columns.size:
            continue
        measured = data.measured["cp10k"][:, columns]
        predictions = {own: data.predicted["cp10k"][:, columns], **others}
        every = _means(measured, predictions[own], weight)
        for name, predicted in predictions.items():
            known = np.isfinite(predicted).all(0)
            if not known.any() and name != own:
                continue
            part = measured[:, known]
            model = every if known.all() else _means(part, predictions[own][:, known], weight)
            point, draws = _means(part, predicted[:, known], weight)
            ends, of_difference = interval(draws), interval(model[1] - draws)
            counts = (n_blocks, int(known.sum()))
            rows.append((data.section_id, name, point, *ends, model[0] - point, *of_difference, *counts))
    return pd.DataFrame(rows, columns=list(INTERVAL_COLUMNS))


def mean_intervals(tables: Sequence[pd.DataFrame], title: str, seed: int = 0) -> pd.DataFrame:
    """Return 95 % intervals of the mean over the sections of a cohort, by a bootstrap over its sections.

    Parameters
    ----------
    tables
        Tables of :func:`intervals`, one per section of the cohort.
    title
        Value of the column ``section``.
    seed
        Seed of the bootstrap; all predictors with scores in the same sections have the same draws.

    Returns
    -------
    DataFrame
        One row for each predictor with scores in at least two sections, with the columns of :func:`intervals`: ``blocks`` is the number
        of these sections, which are the units that are drawn, and ``genes`` the sum over them. With few sections the intervals are too
        narrow.
    """
    if not any(len(table) for table in tables):
        return pd.DataFrame(columns=list(INTERVAL_COLUMNS))
    every = pd.concat([table for table in tables if len(table)], ignore_index=True)
    rows = []
    for name, own in every.groupby("predictor", sort=False):
        if len(own) > 1:
            score, difference = own["mean_pcc"].to_numpy(), own["difference"].to_numpy()
            ends, of_difference = (section_interval(v, DRAWS, seed=seed) for v in (score, difference))
            means = (float(score.mean()), *ends, float(difference.mean()), *of_difference)
            rows.append((title, name, *means, len(own), int(own["genes"].sum())))
    return pd.DataFrame(rows, columns=list(INTERVAL_COLUMNS))


def all_intervals(sections: Sequence[tuple[str, pd.DataFrame]]) -> list[pd.DataFrame]:
    """Return the tables of ``intervals.csv``, without empty ones: those of the sections, then the means over several of a cohort.

    ``sections`` has the cohort and the table of :func:`intervals` of every section.
    """
    tables = [table for _, table in sections]
    for cohort in dict.fromkeys(cohort for cohort, _ in sections):
        own = [table for name, table in sections if name == cohort]
        tables.append(mean_intervals(own, f"mean of {len(own)} sections of {cohort}"))
    return [table for table in tables if len(table)]


def _means(measured: np.ndarray, predicted: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean PCC over genes, of all spots and of each draw; undefined correlations count as 0."""
    if not measured.shape[1]:
        return 0.0, np.zeros(len(weight))
    point = float(np.nan_to_num(pcc_per_gene(measured, predicted)).mean())
    return point, weighted_pcc(measured, predicted, weight).mean(1)


def calibration_rows(data: SectionData) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the calibration of a section's trained genes, or of all its genes if it measured no trained one.

    Returns
    -------
    table, slopes
        :func:`comtip_fast.drawing.calibration_table` with a first column ``section``, and the slope of each gene, float64 (G,).
    """
    genes = data.panel if data.panel.size else np.arange(len(data.keys))
    measured, predicted = data.measured["cp10k"][:, genes], data.predicted["cp10k"][:, genes]
    table = calibration_table(measured, predicted)
    table.insert(0, "section", data.section_id)
    return table, calibration_slope(measured, predicted)


def clusters(
    result: Evaluation, data: SectionData, seed: int = 0
) -> tuple[pd.DataFrame, dict[str, dict[str, float]]] | None:
    """Cluster measured and predicted expression of a section and compare the clusters with the labels of its spots.

    Principal components of the standardised trained genes (or of all genes, if the section measured no trained one) are
    clustered by k-means, with as many clusters as labels.

    Returns
    -------
    tuple or None
        A table of the labelled spots (``section``, ``spot``, ``row``, ``label``, ``measured``, ``predicted``), and the
        adjusted Rand index and normalised mutual information (``ari``, ``nmi``) of ``measured`` and ``predicted``. None
        if the section has fewer than 30 labelled spots, fewer than 2 labels or more than 20.
    """
    spots = result.shards.spots.loc[data.spots]
    genes = data.panel if data.panel.size else np.arange(len(data.keys))
    measured, predicted = data.measured["cp10k"][:, genes], data.predicted["cp10k"][:, genes]
    found = clusters_and_labels(spots["label"].astype(str).to_numpy(), measured, predicted, seed)
    if found is None:
        return None
    table, scores = found
    table.insert(0, "section", data.section_id)
    table.insert(1, "spot", spots["spot_id"].to_numpy()[table["row"]])
    return table, scores


def clusters_and_labels(
    label_N: np.ndarray, measured_NG: np.ndarray, predicted_NG: np.ndarray, seed: int = 0
) -> tuple[pd.DataFrame, dict[str, dict[str, float]]] | None:
    """Cluster labelled spots by measured and by predicted expression, see :func:`clusters`.

    Returns
    -------
    tuple or None
        As for :func:`clusters`, without the columns ``section`` and ``spot``.
    """
    rows = np.flatnonzero(is_labelled(label_N))
    label = label_N[rows]
    k = np.unique(label).size
    if rows.size < MIN_LABELLED or not 2 <= k <= MAX_CLUSTERS:
        return None
    table, scores = pd.DataFrame({"row": rows, "label": label}), {}
    for name, values in (("measured", measured_NG), ("predicted", predicted_NG)):
        found = cluster(values[rows], k, seed)
        table[name] = _matched(label, found)
        scores[name] = agreement(label, found)
    return table, scores


def ranked_genes(pcc_G: np.ndarray, n: int = RANKED) -> list[tuple[str, np.ndarray]]:
    """Return (``Best``, ``Median`` or ``Worst``, indices of ``n`` genes, best first); (``All genes``, indices) if they are few.

    An undefined PCC counts as 0.
    """
    order = np.argsort(-np.nan_to_num(pcc_G), kind="stable")
    if order.size <= 3 * n:
        return [("All genes", order)]
    middle = (order.size - n) // 2
    return [("Best", order[:n]), ("Median", order[middle : middle + n]), ("Worst", order[-n:])]


def _matched(label: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """Return for each spot the number, from 1, of the label matched to its cluster, so that the colours of the maps agree.

    Clusters and labels are matched one to one, with the largest total overlap.
    """
    from scipy.optimize import linear_sum_assignment

    names, of_label = np.unique(label, return_inverse=True)
    overlap = np.zeros((cluster.max() + 1, names.size))
    np.add.at(overlap, (cluster, of_label), 1)
    number = np.empty(len(overlap), np.int64)
    rows, columns = linear_sum_assignment(-overlap)
    number[rows] = columns + 1
    numbered: np.ndarray = number[cluster]
    return numbered
