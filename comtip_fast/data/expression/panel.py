"""Select the genes of a run and the gene panel of a step.

There are three lists of gene-table rows: *trained* genes, *held-out* genes (excluded from training by name, to
evaluate on unseen genes), and the step panel, drawn from the trained genes that the step's sections measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from comtip_shards.sampling.rng import generator
from scipy import sparse

from comtip_fast.config.schema import GenesConfig, PanelConfig


@dataclass
class GeneChoice:
    """Trained and held-out genes, as rows of the shard set's gene table (int64)."""

    trained: np.ndarray
    """Ascending."""
    held_out: np.ndarray
    """Ascending."""
    ranked: dict[str, np.ndarray]
    """Eligible genes of each cohort by decreasing variance."""


def rank_by_variance(
    values: list[sparse.csr_matrix], measured: list[np.ndarray], min_detection: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rank the genes of one cohort by the variance of log1p CP10K over its training sections.

    A gene is eligible if it is detected in at least a share ``min_detection`` of the spots of every training section
    that measured it.

    Parameters
    ----------
    values, measured
        Per training section: (n, genes) log1p CP10K, and bool (genes,).
    min_detection
        Smallest detection rate, 0 to 1.

    Returns
    -------
    rows, variance
        Eligible gene rows by decreasing variance, and the variance of each.
    """
    eligible = np.any(measured, axis=0)
    for value, known in zip(values, measured, strict=True):
        detection = np.asarray((value > 0).mean(axis=0)).ravel()
        eligible &= ~known | (detection >= min_detection)
    # Moments over the spots of the sections that measured the gene.
    n = sum(np.where(known, value.shape[0], 0) for value, known in zip(values, measured, strict=True))
    total = sum(np.asarray(value.sum(axis=0)).ravel() for value in values)
    square = sum(np.asarray(value.multiply(value).sum(axis=0)).ravel() for value in values)
    n = np.maximum(n, 1)
    variance = square / n - (total / n) ** 2
    rows = np.flatnonzero(eligible)
    rows = rows[np.lexsort((rows, -variance[rows]))]
    return rows, variance[rows]


def choose_genes(ranked: dict[str, np.ndarray], symbols: list[str], config: GenesConfig) -> GeneChoice:
    """Choose trained and held-out genes from each cohort's ranking.

    A gene that is held out for one cohort is held out for all. So are its orthologues (same upper-case symbol), because
    they share its text. The first ``held_out_from`` genes of a cohort are held out only if ``config.held_out`` names
    them.
    """
    names = np.array([s.upper() for s in symbols])
    out = {s.upper() for s in config.held_out}
    for rows in ranked.values():
        top = rows[: config.per_cohort] if config.per_cohort else rows
        if config.held_out_every:
            out.update(names[top[config.held_out_from :: config.held_out_every]])
    # The most variable genes of a cohort are the ones it is scored on: they are never held out by rank.
    kept = {n for rows in ranked.values() for n in names[rows[: config.held_out_from]]}
    out = {s.upper() for s in config.held_out} | (out - kept)
    chosen = np.unique(np.concatenate([r[: config.per_cohort] if config.per_cohort else r for r in ranked.values()]))
    held_out = np.isin(names[chosen], list(out))
    return GeneChoice(chosen[~held_out], chosen[held_out], ranked)


def draw_panel(
    trained: np.ndarray,
    weight: np.ndarray,
    available: np.ndarray,
    config: PanelConfig,
    *,
    seed: int,
    step: int,
) -> np.ndarray:
    """Draw the step panel and return ascending indices into ``trained``.

    The panel's size is log-uniform. A share ``config.variable_share`` of the genes is drawn with probability
    proportional to variance, the rest uniformly.

    Parameters
    ----------
    trained
        Gene-table rows of the trained genes.
    weight
        Variance of each, the weight of the first draw.
    available
        bool, whether at least one section of the global batch measured the gene.
    config
        Smallest and largest panel, and the share drawn by variance.
    seed, step
        The panel is a function of these and of the batch's sections only.
    """
    rng = generator(seed, "panel", step)
    candidates = np.flatnonzero(available)
    hi = min(config.max_genes, candidates.size)
    lo = min(config.min_genes, hi)
    size = int(np.clip(np.exp(rng.uniform(np.log(lo), np.log(hi + 1))), lo, hi))
    n_weighted = round(size * config.variable_share)
    # Weighted sampling without replacement by exponential races (Efraimidis and Spirakis 2006).
    race = rng.exponential(size=candidates.size) / np.maximum(weight[candidates], 1e-9)
    weighted = candidates[np.argsort(race, kind="stable")[:n_weighted]]
    rest = np.setdiff1d(candidates, weighted)
    uniform = rng.permutation(rest)[: size - n_weighted]
    return np.sort(np.concatenate([weighted, uniform]))
