"""What a run works out from its training split before the first step: genes, levels, strata.

Everything here is a pure function of the shard set and the config; the result is saved with the export, so
that evaluation and prediction never look at training data again to know what a level means.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from comtip_shards import ShardError, ShardSet
from comtip_shards.sampling.rng import bits
from scipy import sparse

from comtip_fast.config.schema import RunConfig
from comtip_fast.data.expression.levels import LevelTable, fit_levels, log1p_cp10k
from comtip_fast.data.expression.panel import GeneChoice, choose_genes, rank_by_variance
from comtip_fast.data.records import SpotReader
from comtip_fast.objectives import strata_of

log = logging.getLogger("comtip_fast")
TABLE_BYTES = 1 << 30
"""Largest table of levels that ``data.expression: auto`` keeps in memory."""


@dataclass
class TrainingTables:
    """Tables over the trained genes, in the order of ``genes.trained``.

    ``spots`` are the training spots' indices (sorted); ``levels`` (n_spots, G) uint8 holds the whole training split,
    or is None where that is made per batch (``data.expression``); ``measured`` (S, G) bool, ``variance`` (G,) and
    ``strata`` (S, G) int64 serve the panel draw and the mispairing; S counts all sections of the shard set and
    ``n_genes`` all its genes.
    """

    genes: GeneChoice
    table: LevelTable
    spots: np.ndarray
    levels: np.ndarray | None
    measured: np.ndarray
    n_genes: int
    variance: np.ndarray
    strata: torch.Tensor


def training_tables(shards: ShardSet, config: RunConfig) -> TrainingTables:
    """Choose genes, fit levels and sort strata from the spots whose split is ``train``.

    Raises
    ------
    ValueError, ShardError
        No training section, too few genes, or a damaged record under ``data.faults: stop``. Under ``skip`` spots whose
        counts are found damaged here are left out of training, and said.
    """
    train = shards.select(split="train")
    if train.size == 0:
        raise ValueError(f"{shards.path}: no section has split 'train'; build with --split SECTION=train")
    fit, counts, damaged = _read_counts(shards, _fit_spots(shards, train, config.levels.fit_spots), config)
    train = np.setdiff1d(train, damaged)
    section = shards.sections_of(fit)
    values = log1p_cp10k(counts)
    measured_SA = np.stack([shards.measured(s) for s in range(len(shards.manifest.sections))])
    ranked = _rank_cohorts(shards, values, section, measured_SA, config)
    genes = choose_genes({t: r for t, (r, _) in ranked.items()}, [g.symbol for g in shards.genes], config.genes)
    if genes.trained.size < 2:
        raise ValueError(f"{shards.path}: fewer than 2 genes are left to train on; lower genes.min_detection")
    own = values[:, genes.trained].tocsc()
    raw = counts[:, genes.trained].tocsc().astype(np.float32)
    raw.data = np.log1p(raw.data)
    own.sort_indices(), raw.sort_indices()
    measured_SG = measured_SA[:, genes.trained]
    table = fit_levels(own, raw, measured_SG[section], config.levels)
    levels = table.levels(own.toarray(), np.arange(genes.trained.size))
    strata = _strata(levels, section, measured_SG, config)
    kept: np.ndarray | None = levels if fit.size == train.size else None
    if not _keeps_table(train.size * genes.trained.size, config):
        kept = None
    elif kept is None:
        train, kept = _all_levels(shards, train, genes.trained, table, config)
    return TrainingTables(
        genes, table, train, kept, measured_SG, shards.manifest.n_genes, _variance(genes, ranked), strata
    )


def _keeps_table(size: int, config: RunConfig) -> bool:
    return config.data.expression == "table" or (config.data.expression == "auto" and size <= TABLE_BYTES)


def _fit_spots(shards: ShardSet, train: np.ndarray, most: int) -> np.ndarray:
    """Return the spots to learn from, ascending: all, or the same keyed share of every section."""
    if train.size <= most:
        return train
    section = shards.sections_of(train)
    parts = []
    for s in np.unique(section):
        own = train[section == s]
        n = max(1, own.size * most // train.size)
        parts.append(own[np.argsort(bits(0, "fit-spots", index=own), kind="stable")[:n]])
    return np.sort(np.concatenate(parts))


def _read_counts(
    shards: ShardSet, spots: np.ndarray, config: RunConfig
) -> tuple[np.ndarray, sparse.csr_matrix, np.ndarray]:
    """Return (whole spots, their counts, damaged spots)."""
    counts, faults = SpotReader(shards, with_counts=True).counts(spots)
    for place, error in sorted(faults.items()):
        if config.data.faults == "stop":
            raise error
        log.warning("spot %d is left out of training: %s", spots[place], error)
    damaged = spots[sorted(faults)]
    if damaged.size > config.data.max_faults:
        raise ShardError(f"{shards.path}: {damaged.size} records are damaged, data.max_faults={config.data.max_faults}")
    return np.setdiff1d(spots, damaged), counts, damaged


def _all_levels(
    shards: ShardSet, train: np.ndarray, genes: np.ndarray, table: LevelTable, config: RunConfig, size: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """Return (whole training spots, their levels), a chunk at a time."""
    spots, levels = [], []
    for start in range(0, train.size, size):
        whole, counts, _ = _read_counts(shards, train[start : start + size], config)
        values = log1p_cp10k(counts)[:, genes].toarray()
        spots.append(whole)
        levels.append(table.levels(values, np.arange(genes.size)))
    return np.concatenate(spots), np.concatenate(levels)


def _rank_cohorts(
    shards: ShardSet,
    values: sparse.csr_matrix,
    section: np.ndarray,
    measured_SA: np.ndarray,
    config: RunConfig,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    ranked = {}
    cohorts = {s: shards.cohort_of_section(int(s)) for s in np.unique(section)}
    for cohort in sorted(set(cohorts.values())):
        own = [s for s in cohorts if cohorts[s] == cohort]
        ranked[cohort] = rank_by_variance(
            [values[section == s] for s in own], [measured_SA[s] for s in own], config.genes.min_detection
        )
    return ranked


def _variance(genes: GeneChoice, ranked: dict[str, Any]) -> np.ndarray:
    """Return each trained gene's variance, scaled to its cohort's mean; the larger where two cohorts share it."""
    out = np.zeros(genes.trained.size)
    for rows, variance in ranked.values():
        place = np.searchsorted(genes.trained, rows)
        hit = (place < genes.trained.size) & (genes.trained[np.minimum(place, genes.trained.size - 1)] == rows)
        scaled = variance[hit] / max(float(variance[hit].mean()), 1e-9)
        out[place[hit]] = np.maximum(out[place[hit]], scaled)
    return out


def _strata(levels: np.ndarray, section: np.ndarray, measured_SG: np.ndarray, config: RunConfig) -> torch.Tensor:
    S, G = measured_SG.shape
    mean, detection = np.zeros((S, G)), np.zeros((S, G))
    for s in np.unique(section):
        mean[s], detection[s] = levels[section == s].mean(0), (levels[section == s] > 0).mean(0)
    return strata_of(
        torch.from_numpy(mean),
        torch.from_numpy(detection),
        torch.from_numpy(measured_SG),
        config.loss.paat.strata,
    )
