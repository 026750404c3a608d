"""Training tables of a run to which shard sets were appended: genes and levels of its first sets, spots of all sets.

Genes, level edges, weights of the panel draw and the strata of the first sections are those of the sets that the run started with, so
that embeddings keep their meaning. Each appended set is read on its own, so the tables do not depend on the number of extensions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from comtip_shards import ShardSet
from comtip_shards.reader.joined_set import JoinedSet
from comtip_shards.sections.splits import donor_name
from torch import Tensor

from comtip_fast.config.schema import RunConfig
from comtip_fast.data.expression.panel import GeneChoice
from comtip_fast.data.expression.strata import gene_strata
from comtip_fast.data.expression.training_tables import (
    TrainingTables,
    all_levels,
    keeps_levels_in_memory,
    read_sample,
    training_tables,
)

log = logging.getLogger("comtip_fast")
_NEW_RUN = "or start a new run from these weights with `start_from`"


def count_of_first(shards: ShardSet, first: Sequence[str]) -> int:
    """Return the number of sets that the run started with; all of them if the sets do not begin with those of digests ``first``."""
    digests = shards.digests
    return len(first) if first and digests[: len(first)] == list(first) else len(digests)


def first_of(shards: ShardSet, n_first: int) -> ShardSet:
    """Return the first ``n_first`` of the sets that were opened together as ``shards``."""
    if not isinstance(shards, JoinedSet) or n_first == len(shards.sets):
        return shards
    return shards.sets[0] if n_first == 1 else JoinedSet(shards.sets[:n_first])


def without_further_validation(shards: ShardSet, n_first: int) -> None:
    """Remove sections of split ``val`` of further sets from all splits, and check the others; changes the manifest of ``shards``.

    Scores before and after an extension are thus of the same sections.

    Raises
    ------
    ValueError
        A donor of a validation section of the run is in a training section of a further set, but in none of the first sets.
    """
    sections = [*shards.manifest.sections]
    further = [i for i in range(len(sections)) if shards.set_of_section(i) >= n_first]
    if not further:
        return
    first = sections[: len(sections) - len(further)]
    trained = {donor_name(s.donor) for s in first if s.split == "train"} | {""}
    scored = {name: s for s in first if s.split == "val" and (name := donor_name(s.donor)) not in trained}
    for i in further:
        name = donor_name(sections[i].donor)
        if sections[i].split == "train" and name in scored:
            raise ValueError(
                f"{_name(shards, i)}: donor {sections[i].donor} of training section {sections[i].section_id} is that of the run's "
                f"validation section {scored[name].section_id}, so scores before and after the extension could not be "
                f"compared; build the set without this donor, {_NEW_RUN}"
            )
    left_out = [sections[i].section_id for i in further if sections[i].split == "val"]
    if left_out:
        log.info(
            "%d validation sections of further sets are not used, so that scores of the run can be compared: %s",
            len(left_out),
            ", ".join(left_out[:5]) + (" ..." if len(left_out) > 5 else ""),
        )
    for i in further:
        if sections[i].split == "val":
            sections[i] = replace(sections[i], split="")
    shards.manifest = replace(shards.manifest, sections=sections)


def extended_tables(shards: ShardSet, n_first: int, config: RunConfig) -> TrainingTables:
    """Compute the training tables of the first ``n_first`` sets, and extend them to the sections and spots of all sets.

    Raises
    ------
    ValueError
        A further set has no training section, or one of its training sections measured none of the trained genes.
    ShardError
        As for :func:`.training_tables.training_tables`.
    """
    first = first_of(shards, n_first)
    tables = _in_rows_of(training_tables(first, config), first, shards)
    rows = tables.genes.trained
    measured_SG = np.stack([shards.measured(s)[rows] for s in range(len(shards.manifest.sections))])
    n_damaged = first.select(split="train").size - tables.spots.size
    keep = keeps_levels_in_memory(shards.select(split="train").size, rows.size, config)
    parts = []
    for number, own in enumerate(_sections_by_set(shards)[n_first:], n_first):
        part = _read_set(shards, number, own, tables, measured_SG, config, keep, n_damaged)
        n_damaged += part.n_damaged
        parts.append(part)
    levels = [one for one in (tables.levels, *(part.levels for part in parts)) if one is not None]
    return replace(
        tables,
        spots=np.concatenate([tables.spots, *(part.spots for part in parts)]),
        levels=np.concatenate(levels) if keep else None,
        measured=measured_SG,
        n_genes=shards.manifest.n_genes,
        strata=torch.cat([tables.strata, *(part.strata for part in parts)]),
    )


@dataclass
class _Part:
    """What the tables have of one further set."""

    spots: np.ndarray
    levels: np.ndarray | None
    strata: Tensor
    n_damaged: int


def _in_rows_of(tables: TrainingTables, first: ShardSet, shards: ShardSet) -> TrainingTables:
    """Return the tables with gene rows of ``shards``; both gene tables are sorted by key, so the order of genes does not change."""
    row_of = {gene.key: row for row, gene in enumerate(shards.genes)}
    rows = np.array([row_of[gene.key] for gene in first.genes], np.int64)
    genes = tables.genes
    moved = GeneChoice(
        rows[genes.trained],
        rows[genes.held_out],
        {cohort: rows[own] for cohort, own in genes.ranked.items()},
        {cohort: rows[own] for cohort, own in genes.eligible.items()},
    )
    return replace(tables, genes=moved)


def _sections_by_set(shards: ShardSet) -> list[np.ndarray]:
    """Return the section numbers of each set."""
    number = np.array([shards.set_of_section(i) for i in range(len(shards.manifest.sections))])
    return [np.flatnonzero(number == i) for i in range(len(shards.digests))]


def _read_set(
    shards: ShardSet,
    number: int,
    own: np.ndarray,
    tables: TrainingTables,
    measured_SG: np.ndarray,
    config: RunConfig,
    keep: bool,
    damaged_before: int,
) -> _Part:
    """Read a sample of a further set, with sections ``own``, for its strata, and the levels of all its spots if ``keep``."""
    train = shards.select(split="train", sections=own.tolist())
    _check_set(shards, own, measured_SG)
    rows = tables.genes.trained
    with shards.by_ranges():
        sample, fit, damaged = read_sample(shards, train, rows, config, damaged_before)
    train = np.setdiff1d(train, damaged)
    section = shards.sections_of(fit) - int(own[0])
    mean_SG, detection_SG = (torch.from_numpy(a) for a in sample.level_means(tables.table, section, own.size))
    strata = gene_strata(mean_SG, detection_SG, torch.from_numpy(measured_SG[own]), config.loss.paat.strata)
    n_damaged, levels = damaged.size, None
    if keep and fit.size == train.size:
        levels = sample.levels(tables.table)
    elif keep:
        before = train.size
        train, levels = all_levels(shards, train, rows, tables.table, config, damaged_before + n_damaged)
        n_damaged += before - train.size
    _log_set(shards, own, train.size, measured_SG, tables)
    return _Part(train, levels, strata, n_damaged)


def _check_set(shards: ShardSet, own: np.ndarray, measured_SG: np.ndarray) -> None:
    """Raise ValueError if a further set with sections ``own`` cannot be trained on."""
    train = [int(i) for i in own if shards.manifest.sections[i].split == "train"]
    if not train:
        raise ValueError(
            f"{_name(shards, int(own[0]))}: no section has split 'train', so it cannot extend a run; leave it out of data.shards"
        )
    for i in train:
        if not measured_SG[i].any():
            raise ValueError(
                f"{_name(shards, i)}: training section {shards.manifest.sections[i].section_id} measured none of the "
                f"{measured_SG.shape[1]} trained genes of the run; build the set without it, {_NEW_RUN}, which selects genes of all sets"
            )


def _log_set(shards: ShardSet, own: np.ndarray, n_spots: int, measured_SG: np.ndarray, tables: TrainingTables) -> None:
    train = [int(i) for i in own if shards.manifest.sections[i].split == "train"]
    measured = np.any([shards.measured(i) for i in train], axis=0)
    others = int(measured.sum()) - int(measured_SG[train].any(0).sum()) - int(measured[tables.genes.held_out].sum())
    log.info(
        "further set %s: %d training sections, %d spots; it measured %d of the %d trained genes, and %d genes that the run does not train",
        _name(shards, int(own[0])),
        len(train),
        n_spots,
        int(measured_SG[train].any(0).sum()),
        measured_SG.shape[1],
        others,
    )


def _name(shards: ShardSet, section: int) -> str:
    """Return the name of the set that holds a section."""
    return shards.sets[shards.set_of_section(section)].name if isinstance(shards, JoinedSet) else shards.name
