"""What the report adds to the scores: intervals over spatial blocks, calibration and clusters.

Shapes: N spots, G genes, D draws.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from comtip_shards.sampling.rng import generator
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from comtip_fast.evaluation.evaluate import Evaluation, SectionData
from comtip_fast.metrics import pcc_per_gene
from comtip_fast.plots import calibration_slope, calibration_table

DRAWS, BLOCKS_PER_SIDE = 500, 6
"""Draws of the bootstrap, and blocks along the longer side of a section."""
MIN_LABELLED, MAX_CLUSTERS, COMPONENTS = 30, 20, 20
"""Fewer labelled spots are not compared; most labels that are compared; principal components that are clustered."""


def block_of_spots(xy_N2: np.ndarray, per_side: int = BLOCKS_PER_SIDE) -> np.ndarray:
    """Return the spatial block of each spot, int64 (N,), numbered from 0: squares of a grid over the section."""
    xy = np.asarray(xy_N2, np.float64) - np.min(xy_N2, axis=0)
    side = float(xy.max()) / per_side or 1.0
    cell = np.minimum((xy / side).astype(np.int64), per_side - 1)
    block: np.ndarray = np.unique(cell[:, 0] * per_side + cell[:, 1], return_inverse=True)[1]
    return block


def weighted_pcc(a_NG: np.ndarray, b_NG: np.ndarray, weight_DN: np.ndarray) -> np.ndarray:
    """Return the correlation of each gene with weighted spots, float64 (D, G); NaN where undefined."""
    a, b = a_NG - a_NG.mean(0), b_NG - b_NG.mean(0)
    total = weight_DN.sum(1, keepdims=True)
    mean_a, mean_b = weight_DN @ a / total, weight_DN @ b / total
    power_a, power_b = weight_DN @ a**2 / total - mean_a**2, weight_DN @ b**2 / total - mean_b**2
    cross = weight_DN @ (a * b) / total - mean_a * mean_b
    defined = (power_a > 1e-12 * np.maximum((a**2).mean(0), 1e-300)) & (
        power_b > 1e-12 * np.maximum((b**2).mean(0), 1e-300)
    )
    out: np.ndarray = np.where(defined, cross / np.sqrt(np.where(defined, power_a * power_b, 1.0)), np.nan)
    return out


def intervals(data: SectionData, seed: int = 0) -> pd.DataFrame:
    """Return 95 % intervals of the mean PCC over the most variable genes, by a bootstrap over spatial blocks.

    Blocks are drawn with replacement, because neighbouring spots are not independent. The same draws are used for all
    predictors, so that differences are paired.

    Returns
    -------
    DataFrame
        One row per predictor: ``section``, ``predictor``, ``mean_pcc``, ``low``, ``high``, ``difference`` (mean PCC of the
        model minus that of the predictor), ``difference_low``, ``difference_high`` and ``blocks``. NaN with fewer than 5 blocks.
    """
    measured = data.measured["cp10k"][:, data.hvg]
    block = block_of_spots(data.xy)
    n_blocks = int(block.max()) + 1
    rng = generator(seed, "report intervals", data.section_id)
    drawn = rng.integers(n_blocks, size=(DRAWS, n_blocks))
    times = np.stack([np.bincount(d, minlength=n_blocks) for d in drawn])
    weight = times[:, block].astype(np.float64)
    weight = weight[weight.sum(1) > 0]
    predictions = {"zero_shot": data.predicted["cp10k"][:, data.hvg], **data.baselines}
    model = _means(measured, predictions["zero_shot"], weight)
    rows = []
    for name, predicted in predictions.items():
        point, draws = _means(measured, predicted, weight)
        low, high = np.quantile(draws, [0.025, 0.975])
        difference = model[1] - draws
        d_low, d_high = np.quantile(difference, [0.025, 0.975])
        rows.append((data.section_id, name, point, low, high, model[0] - point, d_low, d_high, n_blocks))
    names = ["section", "predictor", "mean_pcc", "low", "high", "difference", "difference_low", "difference_high"]
    table = pd.DataFrame(rows, columns=[*names, "blocks"])
    if n_blocks < 5:
        table[["low", "high", "difference_low", "difference_high"]] = np.nan
    return table


def _means(measured: np.ndarray, predicted: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean PCC over genes, and that of each draw; undefined correlations count as 0."""
    if not measured.shape[1]:
        return 0.0, np.zeros(len(weight))
    point = float(np.nan_to_num(pcc_per_gene(measured, predicted)).mean())
    return point, np.nan_to_num(weighted_pcc(measured, np.asarray(predicted, np.float64), weight)).mean(1)


def calibration_rows(data: SectionData) -> tuple[pd.DataFrame, np.ndarray]:
    """Return :func:`comtip_fast.plots.calibration_table` of a section's trained genes, and the slope of each gene."""
    genes = data.panel if data.panel.size else np.arange(len(data.keys))
    measured, predicted = data.measured["cp10k"][:, genes], data.predicted["cp10k"][:, genes]
    table = calibration_table(measured, predicted)
    table.insert(0, "section", data.section_id)
    return table, calibration_slope(measured, predicted)


def clusters(
    result: Evaluation, data: SectionData, seed: int = 0
) -> tuple[pd.DataFrame, dict[str, dict[str, float]]] | None:
    """Cluster measured and predicted expression of a section and compare the clusters with the labels of its spots.

    Principal components of the standardised genes are clustered by k-means, with as many clusters as labels.

    Returns
    -------
    tuple or None
        A table of the labelled spots (``section``, ``spot``, ``row``, ``label``, ``measured``, ``predicted``), and the
        adjusted Rand index and normalised mutual information (``ari``, ``nmi``) of ``measured`` and ``predicted``. None if
        the section has fewer than two labels or few labelled spots.
    """
    spots = result.shards.spots.loc[data.spots]
    label = spots["label"].astype(str).to_numpy()
    rows = np.flatnonzero(~np.isin(label, ["", "nan", "undetermined"]))
    k = np.unique(label[rows]).size
    if rows.size < MIN_LABELLED or not 2 <= k <= MAX_CLUSTERS:
        return None
    table = pd.DataFrame(
        {"section": data.section_id, "spot": spots["spot_id"].to_numpy()[rows], "row": rows, "label": label[rows]}
    )
    agreement = {}
    for name, values in (("measured", data.measured["cp10k"]), ("predicted", data.predicted["cp10k"])):
        x = values[rows][:, data.panel if data.panel.size else slice(None)]
        x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
        components = PCA(min(COMPONENTS, *x.shape), random_state=seed).fit_transform(x)
        found = KMeans(k, n_init=5, random_state=seed).fit_predict(components)
        table[name] = _matched(label[rows], found)
        agreement[name] = {
            "ari": float(adjusted_rand_score(label[rows], found)),
            "nmi": float(normalized_mutual_info_score(label[rows], found)),
        }
    return table, agreement


def _matched(label: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """Return cluster numbers from 1, ordered by the label that they overlap most, so that colours of maps agree."""
    from scipy.optimize import linear_sum_assignment

    names, of_label = np.unique(label, return_inverse=True)
    overlap = np.zeros((cluster.max() + 1, names.size))
    np.add.at(overlap, (cluster, of_label), 1)
    number = np.empty(len(overlap), np.int64)
    rows, columns = linear_sum_assignment(-overlap)
    number[rows] = columns + 1
    numbered: np.ndarray = number[cluster]
    return numbered
