"""Which genes a run learns, and which of them a step reads.

Three lists of rows of the gene table: *trained* genes, *held-out* genes (kept from training by name, to test
genes never seen), and the step panel, drawn from the trained genes measured by the step's sections.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from comtip_shards.sampling.rng import generator
from scipy import sparse

from comtip_fast.config.schema import GenesConfig, PanelConfig


@dataclass
class GeneChoice:
    """Rows of the gene table, sorted; and per cohort its genes by falling variance."""

    trained: np.ndarray
    held_out: np.ndarray
    ranked: dict[str, np.ndarray]


def rank_by_variance(
    values: list[sparse.csr_matrix], measured: list[np.ndarray], min_detection: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rank genes of one cohort by the variance of log1p CP10K over its training sections.

    A gene must be detected in ``min_detection`` of the spots of every training section that measured it.

    Parameters
    ----------
    values, measured
        Per training section: (n, genes) log1p CP10K, and bool (genes,).

    Returns
    -------
    rows, variance
        Eligible gene rows by falling variance, and the variance of each.
    """
    eligible = np.any(measured, axis=0)
    for value, known in zip(values, measured, strict=True):
        detection = np.asarray((value > 0).mean(axis=0)).ravel()
        eligible &= ~known | (detection >= min_detection)
    # Moments over the spots of those sections that measured the gene.
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

    A gene held out for one cohort is held out for all, and so are its orthologues (same upper-case symbol):
    they share their text, and would be seen otherwise.
    """
    names = np.array([s.upper() for s in symbols])
    out = {s.upper() for s in config.held_out}
    for rows in ranked.values():
        top = rows[: config.per_cohort] if config.per_cohort else rows
        if config.held_out_every:
            out.update(names[top[config.held_out_from :: config.held_out_every]])
    # The most variable genes of any cohort are what it is scored on: they are never held out by rank.
    kept = {n for rows in ranked.values() for n in names[rows[: config.held_out_from]]}
    out = {s.upper() for s in config.held_out} | (out - kept)
    wanted = np.unique(np.concatenate([r[: config.per_cohort] if config.per_cohort else r for r in ranked.values()]))
    hidden = np.isin(names[wanted], list(out))
    return GeneChoice(wanted[~hidden], wanted[hidden], ranked)


def draw_panel(
    trained: np.ndarray,
    weight: np.ndarray,
    available: np.ndarray,
    config: PanelConfig,
    *,
    seed: int,
    step: int,
) -> np.ndarray:
    """Draw the step panel: G log-uniform, half by variance and half uniform; sorted positions in ``trained``.

    Parameters
    ----------
    trained
        Rows of the gene table that training learns.
    weight
        Variance of each, for the weighted half.
    available
        bool, measured by at least one section of the global batch.
    seed, step
        The panel is a function of these and of the batch's sections alone.
    """
    rng = generator(seed, "panel", step)
    open_ = np.flatnonzero(available)
    hi = min(config.max_genes, open_.size)
    lo = min(config.min_genes, hi)
    size = int(np.clip(np.exp(rng.uniform(np.log(lo), np.log(hi + 1))), lo, hi))
    n_weighted = round(size * config.variable_share)
    # Weighted sampling without replacement by exponential races (Efraimidis and Spirakis 2006).
    race = rng.exponential(size=open_.size) / np.maximum(weight[open_], 1e-9)
    first = open_[np.argsort(race, kind="stable")[:n_weighted]]
    rest = np.setdiff1d(open_, first)
    second = rng.permutation(rest)[: size - n_weighted]
    return np.sort(np.concatenate([first, second]))
