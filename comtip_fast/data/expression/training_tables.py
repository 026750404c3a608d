"""Tables computed from the training split before the first step: genes, levels, strata.

They are a pure function of the shard set and the config. Genes and levels are saved with the export, so that
evaluation and prediction do not need the training data.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from comtip_shards import ShardError, ShardSet
from comtip_shards.sampling.rng import bits
from scipy import sparse
from torch import Tensor

from comtip_fast.config.schema import RunConfig
from comtip_fast.data.expression.levels import LevelTable, fit_levels, log1p_cp10k
from comtip_fast.data.expression.panel import GeneChoice, choose_genes, rank_by_variance
from comtip_fast.data.expression.strata import strata_from_levels
from comtip_fast.data.records import SpotReader

log = logging.getLogger("comtip_fast")
TABLE_BYTES = 1 << 30
"""Size in bytes up to which ``data.expression: auto`` keeps the levels of all training spots in memory."""


@dataclass
class TrainingTables:
    """Tables over the G trained genes, in the order of ``genes.trained``, and the S sections of the shard set."""

    genes: GeneChoice
    table: LevelTable
    spots: np.ndarray
    """int64, indices of the training spots, ascending."""
    levels: np.ndarray | None
    """uint8 (n_spots, G), levels of all training spots; None if levels are computed per batch (``data.expression``)."""
    measured: np.ndarray
    """bool (S, G), whether the section measured the gene."""
    n_genes: int
    """Number of genes in the shard set."""
    variance: np.ndarray
    """(G,), weights of the panel draw."""
    strata: Tensor
    """int64 (S, G), strata of the mispairing."""


def training_tables(shards: ShardSet, config: RunConfig) -> TrainingTables:
    """Choose genes, fit levels and compute strata from the spots whose split is ``train``.

    Under ``data.faults: skip``, spots with damaged counts are removed from training and logged.

    Raises
    ------
    ValueError
        There is no training section, or fewer than 2 genes are eligible.
    ShardError
        A record is damaged and ``data.faults`` is ``stop``, or more than ``data.max_faults`` records are damaged.
    """
    train = shards.select(split="train")
    if train.size == 0:
        raise ValueError(f"{shards.path}: no section has split 'train'; rebuild with --split SECTION=train")
    fit, counts, damaged = _read_counts(shards, _fit_spots(shards, train, config.levels.fit_spots), config)
    train = np.setdiff1d(train, damaged)
    section = shards.sections_of(fit)
    values = log1p_cp10k(counts)
    measured_SA = np.stack([shards.measured(s) for s in range(len(shards.manifest.sections))])
    ranked = _rank_cohorts(shards, values, section, measured_SA, config)
    genes = choose_genes({t: r for t, (r, _) in ranked.items()}, [g.symbol for g in shards.genes], config.genes)
    if genes.trained.size < 2:
        raise ValueError(f"{shards.path}: fewer than 2 genes are eligible for training; lower genes.min_detection")
    cp10k = values[:, genes.trained].tocsc()
    raw = counts[:, genes.trained].tocsc().astype(np.float32)
    raw.data = np.log1p(raw.data)
    cp10k.sort_indices()
    raw.sort_indices()
    measured_SG = measured_SA[:, genes.trained]
    table = fit_levels(cp10k, raw, measured_SG[section], config.levels)
    fit_levels_NG = table.levels(cp10k.toarray(), np.arange(genes.trained.size))
    levels: np.ndarray | None = None
    if _keep_in_memory(train.size * genes.trained.size, config):
        levels = fit_levels_NG
        if fit.size < train.size:
            train, levels = _all_levels(shards, train, genes.trained, table, config)
    return TrainingTables(
        genes=genes,
        table=table,
        spots=train,
        levels=levels,
        measured=measured_SG,
        n_genes=shards.manifest.n_genes,
        variance=_variance(genes, ranked),
        strata=strata_from_levels(fit_levels_NG, section, measured_SG, config.loss.paat.strata),
    )


def _keep_in_memory(size: int, config: RunConfig) -> bool:
    return config.data.expression == "table" or (config.data.expression == "auto" and size <= TABLE_BYTES)


def _fit_spots(shards: ShardSet, train: np.ndarray, most: int) -> np.ndarray:
    """Return the spots to fit on, ascending: all, or a keyed sample with the same fraction of every section."""
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
    """Return (readable spots, their counts, damaged spots)."""
    counts, faults = SpotReader(shards, with_counts=True).counts(spots)
    for i, error in sorted(faults.items()):
        if config.data.faults == "stop":
            raise error
        log.warning("spot %d is excluded from training: %s", spots[i], error)
    damaged = spots[sorted(faults)]
    if damaged.size > config.data.max_faults:
        raise ShardError(
            f"{shards.path}: {damaged.size} records are damaged, data.max_faults={config.data.max_faults}; "
            "run `comtip shards verify`, then rebuild or raise the limit"
        )
    return np.setdiff1d(spots, damaged), counts, damaged


def _all_levels(
    shards: ShardSet, train: np.ndarray, genes: np.ndarray, table: LevelTable, config: RunConfig, size: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """Return (readable training spots, their levels), read in chunks of ``size`` spots."""
    spots, levels = [], []
    for start in range(0, train.size, size):
        readable, counts, _ = _read_counts(shards, train[start : start + size], config)
        values = log1p_cp10k(counts)[:, genes].toarray()
        spots.append(readable)
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
    """Return each trained gene's variance divided by its cohort's mean; the maximum over the cohorts of the gene."""
    out = np.zeros(genes.trained.size)
    for rows, variance in ranked.values():
        index = np.searchsorted(genes.trained, rows)
        trained = (index < genes.trained.size) & (genes.trained[np.minimum(index, genes.trained.size - 1)] == rows)
        scaled = variance[trained] / max(float(variance[trained].mean()), 1e-9)
        out[index[trained]] = np.maximum(out[index[trained]], scaled)
    return out
