"""Tables that are computed from the training split before the first step: genes, levels and strata.

The tables depend only on the shard set and the config. Genes and levels are saved with the export, so that evaluation and
prediction do not need the training data.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from comtip_shards import ShardError, ShardSet
from comtip_shards.reader.statistics import gene_statistics
from scipy import sparse
from torch import Tensor

from comtip_fast.config.schema import GenesConfig, RunConfig
from comtip_fast.data.expression.level_fit import CHUNK, CountSample, fit_levels
from comtip_fast.data.expression.levels import LevelTable, log1p_cp10k
from comtip_fast.data.expression.panel import CohortStatistics, GeneChoice, assay_balance, choose_genes
from comtip_fast.data.expression.strata import gene_strata
from comtip_fast.data.records import SpotReader

log = logging.getLogger("comtip_fast")
TABLE_BYTES, TABLE_SPOTS = 1 << 30, 200_000
"""Bytes and spots up to which ``data.expression=auto`` reads all training counts at the start and keeps their levels in memory."""


@dataclass
class TrainingTables:
    """Tables of the G trained genes, in the order of ``genes.trained``, and of the S sections of the shard set."""

    genes: GeneChoice
    table: LevelTable
    spots: np.ndarray
    """int64, indices of the training spots, ascending."""
    levels: np.ndarray | None
    """uint8 (n_spots, G), levels of all training spots; None if levels are computed per batch (``data.expression``)."""
    measured: np.ndarray
    """bool (S, G): whether the section measured the gene."""
    n_genes: int
    """Number of genes in the shard set."""
    variance: np.ndarray
    """float64 (G,), variance of each gene relative to its cohort, the weight of the gene in the panel draw
    (``panel.variable_share``)."""
    strata: Tensor
    """int64 (S, G), stratum of each gene in each section (:mod:`comtip_fast.data.expression.strata`)."""
    balance: np.ndarray | None = None
    """float64 (G,), weights in the panel draw that balance unequal gene lists (``panel.balance``); None for equal weights."""


def training_tables(shards: ShardSet, config: RunConfig) -> TrainingTables:
    """Select genes, fit levels and compute strata from the spots of split ``train``.

    Counts are read for the spots that levels are fitted on (``levels.fit_spots``) or, if all levels are kept in memory, for all
    training spots. With ``data.faults=skip``, spots whose counts prove to be damaged are logged and excluded from training.

    Raises
    ------
    ValueError
        There is no training section, or fewer than 2 genes can be trained.
    ShardError
        A record is damaged and ``data.faults`` is ``stop``; more than ``data.max_faults`` records are damaged; or a table of the
        shard set is damaged.
    """
    train = shards.select(split="train")
    if train.size == 0:
        raise ValueError(
            f"{shards.name}: no section has split 'train'; build the set again with sections in split train"
        )
    genes, variance = _genes(shards, np.unique(shards.sections_of(train)), config)
    if genes.trained.size < 2:
        raise ValueError(
            f"{shards.name}: {genes.trained.size} genes can be trained, but at least 2 are needed; {_more_genes(genes, config.genes)}"
        )
    with shards.by_ranges():  # a few records of every shard
        sample, fit, damaged = read_sample(shards, train, genes.trained, config)
    train = np.setdiff1d(train, damaged)
    n_sections, section = len(shards.manifest.sections), shards.sections_of(fit)
    measured_SG = np.stack([shards.measured(s)[genes.trained] for s in range(n_sections)])
    n_measured_G = np.bincount(section, minlength=n_sections) @ measured_SG
    table = fit_levels(sample, n_measured_G, config.levels)
    mean_SG, detection_SG = (torch.from_numpy(a) for a in sample.level_means(table, section, n_sections))
    strata = gene_strata(mean_SG, detection_SG, torch.from_numpy(measured_SG), config.loss.paat.strata)
    levels: np.ndarray | None = None
    if keeps_levels_in_memory(train.size, genes.trained.size, config):
        if fit.size < train.size:
            train, levels = all_levels(shards, train, genes.trained, table, config, damaged.size)
        else:
            levels = sample.levels(table)
    return TrainingTables(
        genes=genes,
        table=table,
        spots=train,
        levels=levels,
        measured=measured_SG,
        n_genes=shards.manifest.n_genes,
        variance=variance,
        strata=strata,
        balance=_balance(shards, train, measured_SG, config),
    )


def _more_genes(genes: GeneChoice, config: GenesConfig) -> str:
    """Return what to do if fewer than 2 genes can be trained: which setting to change."""
    if genes.trained.size + genes.held_out.size >= 2:
        return (
            f"hold out fewer genes (genes.held_out_every={config.held_out_every}, "
            f"{len(config.held_out)} names in genes.held_out)"
        )
    if np.unique(np.concatenate([*genes.eligible.values()])).size >= 2:
        return f"raise genes.per_cohort ({config.per_cohort})"
    if config.min_detection > 0:
        return f"lower genes.min_detection ({config.min_detection:g})"
    return "train on sections that measured more genes"


def _balance(shards: ShardSet, train: np.ndarray, measured_SG: np.ndarray, config: RunConfig) -> np.ndarray | None:
    """Return the weights of :func:`assay_balance`; None if ``panel.balance`` is ``none``."""
    if config.panel.balance == "none":
        return None
    n_spots = np.bincount(shards.sections_of(train), minlength=measured_SG.shape[0])
    return assay_balance(measured_SG, n_spots, config.data.sections_per_batch)


def _genes(shards: ShardSet, sections: np.ndarray, config: RunConfig) -> tuple[GeneChoice, np.ndarray]:
    """Return the genes selected by statistics of the training sections, and the variance weights of the trained genes."""
    n_genes = shards.manifest.n_genes
    merged: dict[str, CohortStatistics] = {}
    wanted = set(sections.tolist())
    for s, one in enumerate(gene_statistics(shards)):
        if s in wanted:
            own = merged.setdefault(shards.cohort_of_section(s), CohortStatistics.of([], n_genes))
            own.add(np.flatnonzero(shards.measured(s)), one)
    scored, eligible = {}, {}
    for cohort, own in sorted(merged.items()):
        scored[cohort], _ = own.ranked(config.genes.min_detection, "every")
        eligible[cohort] = own.ranked(config.genes.min_detection, config.genes.detected_in)
    symbols = [g.symbol for g in shards.genes]
    trainable = {c: rows for c, (rows, _) in eligible.items()}
    genes = choose_genes(scored, symbols, config.genes, trainable, config.train.seed)
    return genes, _variance(genes, eligible)


def keeps_levels_in_memory(n_spots: int, n_genes: int, config: RunConfig) -> bool:
    """Return whether the levels of all training spots are kept in memory (``data.expression``)."""
    small = n_spots <= TABLE_SPOTS and n_spots * n_genes <= TABLE_BYTES
    return config.data.expression == "table" or (config.data.expression == "auto" and small)


def _fit_spots(shards: ShardSet, train: np.ndarray, most: int) -> np.ndarray:
    """Return the spots to fit on, ascending: all if there are at most ``most``, otherwise about ``most``.

    The same fraction of every section is used, but at least 1 spot.

    The first records of each section are used. They are a random sample of the section, because sections are stored shuffled,
    and they are in few shard files.
    """
    if train.size <= most:
        return train
    section = shards.sections_of(train)
    ends = np.searchsorted(section, np.unique(section), side="right")
    parts = np.split(train, ends[:-1])
    return np.concatenate([own[: max(1, own.size * most // train.size)] for own in parts])


def read_sample(
    shards: ShardSet, train: np.ndarray, genes: np.ndarray, config: RunConfig, damaged_before: int = 0
) -> tuple[CountSample, np.ndarray, np.ndarray]:
    """Return the counts of ``genes`` in the readable spots to fit on, these spots, and the damaged ones.

    Counts are read in chunks and reduced to ``genes``, so that memory does not depend on the number of genes in the set.
    ``damaged_before`` is as in :func:`_read_counts`.
    """
    chosen = _fit_spots(shards, train, config.levels.fit_spots)
    sample, fit = CountSample(genes.size), []
    damaged: list[np.ndarray] = []
    for start in range(0, chosen.size, CHUNK):
        n_damaged = damaged_before + sum(d.size for d in damaged)
        spots, counts, bad = _read_counts(shards, chosen[start : start + CHUNK], config, n_damaged)
        sample.add(counts, genes)
        fit.append(spots)
        damaged.append(bad)
    return sample, np.concatenate(fit), np.concatenate(damaged)


def _read_counts(
    shards: ShardSet, spots: np.ndarray, config: RunConfig, damaged_before: int = 0
) -> tuple[np.ndarray, sparse.csr_matrix, np.ndarray]:
    """Return the readable spots, their counts and the damaged spots; raise or log a damaged record (``data.faults``).

    ``damaged_before`` is the number of damaged records found earlier, which count towards ``data.max_faults`` too.
    """
    counts, faults = SpotReader(shards, with_counts=True).counts(spots)
    for i, error in sorted(faults.items()):
        if config.data.faults == "stop":
            raise error
        log.warning("spot %d is excluded from training: %s", spots[i], error)
    damaged = spots[sorted(faults)]
    n_damaged = damaged_before + damaged.size
    if n_damaged > config.data.max_faults:
        raise ShardError(
            f"{shards.name}: {n_damaged} records are damaged, more than data.max_faults={config.data.max_faults}; "
            "check the set with `comtip shards verify`, then build it again or raise data.max_faults"
        )
    return np.setdiff1d(spots, damaged), counts, damaged


def all_levels(
    shards: ShardSet, train: np.ndarray, genes: np.ndarray, table: LevelTable, config: RunConfig, damaged_before: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the readable training spots and their levels, uint8 (n, G), read in chunks.

    ``damaged_before`` is the number of damaged records that ``train`` no longer contains, as in :func:`_read_counts`.
    """
    spots: list[np.ndarray] = []
    levels = []
    for start in range(0, train.size, CHUNK):
        damaged = damaged_before + start - sum(part.size for part in spots)
        readable, counts, _ = _read_counts(shards, train[start : start + CHUNK], config, damaged)
        values = log1p_cp10k(counts)[:, genes].toarray()
        spots.append(readable)
        levels.append(table.levels(values, np.arange(genes.size)))
    return np.concatenate(spots), np.concatenate(levels)


def _variance(genes: GeneChoice, ranked: dict[str, Any]) -> np.ndarray:
    """Return the relative variance of each trained gene, float64 (G,); the maximum over cohorts.

    In a cohort, it is the gene's variance divided by the mean variance of the cohort's trained genes. A gene that is eligible in no
    cohort has 0.
    """
    out = np.zeros(genes.trained.size)
    for rows, variance in ranked.values():
        index = np.searchsorted(genes.trained, rows)
        trained = (index < genes.trained.size) & (genes.trained[np.minimum(index, genes.trained.size - 1)] == rows)
        scaled = variance[trained] / max(float(variance[trained].mean()), 1e-9)
        out[index[trained]] = np.maximum(out[index[trained]], scaled)
    return out
