"""Fit of the readout of a trained model: reading of features and expression, and one fit per cohort."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from comtip_shards import ShardSet
from comtip_shards.progress import Progress
from comtip_shards.sampling.rng import generator
from scipy import sparse

from comtip_fast.config.schema import RunConfig
from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.data.expression.panel import rank_by_variance
from comtip_fast.data.expression.training_tables import TrainingTables
from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.models import CoMTIP
from comtip_fast.models.readout.features import BLOCKS, RADII, ReadoutSettings, penalty_scale, tile_features
from comtip_fast.models.readout.heads import Readout
from comtip_fast.models.readout.section_statistics import standardise
from comtip_fast.runtime.devices import autocast
from comtip_fast.training.readout.solve import KINDS, CohortData, SectionTable, fit_cohort

log = logging.getLogger("comtip_fast")
SCORE_GENES = 50
"""Number of genes, the most variable ones, on which candidates are compared."""
MIN_SPOTS = 10
"""Cohorts with fewer training spots have no head."""
BATCH = 128


@torch.no_grad()
def fit_readout(
    model: CoMTIP, config: RunConfig, shards: ShardSet, tables: TrainingTables, loader: BaseLoader
) -> Readout | None:
    """Fit one readout per cohort on the sections of split ``train``.

    Split ``val`` selects the number of programmes and the ridge penalty; if it is empty, see :func:`.solve.fit_cohort`. Held-out
    genes and split ``test`` are not used. Called on one rank, with a model that holds all parameters.

    Returns
    -------
    Readout or None
        None if no cohort has at least :data:`MIN_SPOTS` readable training spots and 2 genes.

    Raises
    ------
    ShardError
        More records are damaged than ``data.faults`` and ``data.max_faults`` allow.
    """
    readout = Readout(readout_settings(config), [])
    cohorts: dict[str, list[int]] = {}
    for section in np.unique(shards.sections_of(tables.spots)):
        cohorts.setdefault(shards.cohort_of_section(int(section)), []).append(int(section))
    quota = max(MIN_SPOTS, config.readout.max_spots // max(1, sum(map(len, cohorts.values()))))
    reader = _Reader(model.eval(), shards, loader, readout, quota, config.train.seed, config.train.precision)
    kinds = KINDS if config.readout.kind == "auto" else (config.readout.kind,)
    for cohort, train in sorted(cohorts.items()):
        data = _cohort_data(reader, tables, cohort, train)
        if data is None:
            continue
        head = fit_cohort(data, readout.settings, kinds=kinds, min_donors=config.readout.min_donors)
        readout.heads.append(head)
        n = sum(len(s.x_NF) for s in data.train)
        log.info("readout of %s: %d genes, %d spots; %s", cohort, len(data.keys), n, _choices(head.facts))
    return readout if readout.heads else None


def readout_settings(config: RunConfig) -> ReadoutSettings:
    """Return the settings of the features of a run's readout."""
    return ReadoutSettings(config.readout.views, RADII if config.readout.context else (), config.align.dim)


def _choices(facts: dict[str, Any]) -> str:
    """Return the kind, the number of programmes and the penalty of every block of features as text for the log."""
    parts = []
    for block in BLOCKS:
        for norm, one in facts.get(block, {}).items():
            score = "not scored" if one["score"] is None else f"PCC {one['score']:.3f}"
            parts.append(
                f"{block}, {norm}: {one['kind']}, {one['programmes'] or 'all'} programmes, penalty {one['alpha']:g} ({score})"
            )
    return "; ".join(parts)


def _cohort_data(reader: _Reader, tables: TrainingTables, cohort: str, train: list[int]) -> CohortData | None:
    """Read the training and validation sections of a cohort; return None if there are too few spots or genes."""
    shards = reader.shards
    sections = shards.manifest.sections
    rows = tables.genes.trained[tables.measured[train].any(0)]
    valid = [i for i, s in enumerate(sections) if s.split == "val" and shards.cohort_of_section(i) == cohort]
    raw: dict[int, tuple[np.ndarray, dict[str, np.ndarray]]] = {}
    with Progress(f"features for the readout of {cohort}", len(train) + len(valid), unit="section", show=True) as bar:
        for i in [*train, *valid]:
            part = reader.read(i, rows)
            if part is not None:
                raw[i] = part
            bar.update()
    fitted = [i for i in train if i in raw]
    n = sum(len(raw[i][0]) for i in fitted)
    if n < MIN_SPOTS or rows.size < 2:
        log.warning(
            "no readout for %s: %d readable training spots and %d genes, but at least %d spots and 2 genes are needed; genes "
            "that no other cohort has are predicted from level sentences",
            cohort,
            n,
            rows.size,
            MIN_SPOTS,
        )
        return None
    x = np.concatenate([raw[i][0] for i in fitted])
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)

    def table(i: int) -> SectionTable:
        x = standardise(raw[i][0], mean, std).astype(np.float32)
        return SectionTable(x, raw[i][1], shards.measured(i)[rows])

    own = [table(i) for i in fitted]
    return CohortData(
        cohort=cohort,
        keys=[shards.genes[r].key for r in rows],
        train=own,
        valid=[table(i) for i in valid if i in raw],
        mean_F=mean,
        std_F=std,
        score_genes=_score_genes(tables.genes.ranked.get(cohort), rows, own, reader.loader.config.genes.min_detection),
        n_donors=len({sections[i].donor for i in fitted}),
        scale_F=penalty_scale(reader.model, reader.readout.settings),
    )


def _score_genes(
    ranked: np.ndarray | None, rows: np.ndarray, train: Sequence[SectionTable], min_detection: float
) -> np.ndarray:
    """Return the indices in ``rows`` of the (up to 50) most variable genes.

    A cohort of which the run's first shard sets have no training section, or no gene that is detected in enough spots, has no
    ranking. Without genes to compare candidates on, the first one, with the weakest penalty, would be used. The genes are therefore
    ranked here, on the spots to fit.

    Parameters
    ----------
    ranked
        Rows of the cohort's genes by decreasing variance; None if the run did not rank them.
    rows
        Rows of the genes of the readout, ascending.
    train
        The training sections.
    min_detection
        Smallest detection rate of a ranked gene; if no gene reaches it, all are ranked.
    """
    known = np.zeros(0, np.int64) if ranked is None else ranked[np.isin(ranked, rows)]
    if known.size:
        return np.searchsorted(rows, known[:SCORE_GENES])
    values, measured = [sparse.csr_matrix(s.y["cp10k"]) for s in train], [s.measured_G for s in train]
    own = rank_by_variance(values, measured, min_detection)[0]
    return (own if own.size else rank_by_variance(values, measured, 0.0)[0])[:SCORE_GENES]


@dataclass(frozen=True)
class _Reader:
    """Reads features and expression of sections."""

    model: CoMTIP
    shards: ShardSet
    loader: BaseLoader
    readout: Readout
    quota: int
    """Largest number of spots per section."""
    seed: int
    precision: str
    """``train.precision``: the readout is fitted on features of the precision in which a prediction computes them."""

    def read(self, section: int, rows: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]] | None:
        """Return features (n, F) and expression (n, G) per normalisation; None if none of the chosen spots is readable."""
        spots = neighbouring_spots(self.shards, self.shards.select(sections=[section]), self.quota, self.seed, section)
        spots, counts = self.loader.counts(spots)
        device = next(self.model.parameters()).device
        parts, readable = [], [np.zeros(0, np.int64)]
        for start in range(0, spots.size, BATCH):
            part = spots[start : start + BATCH]
            found, tiles = self.loader.tiles(part, np.zeros(part.shape, np.int64))
            if found.size:
                with autocast(self.precision, device):
                    features = tile_features(self.model, tiles.to(device), self.readout.settings)[1]
                parts.append(features.cpu().numpy())
                readable.append(found)
        whole = np.concatenate(readable)
        if not whole.size:
            return None
        counts = counts[np.isin(spots, whole)]
        y = {"cp10k": log1p_cp10k(counts)[:, rows].toarray(), "raw": np.log1p(counts[:, rows].toarray())}
        xy = self.shards.spots.loc[whole, ["x_px", "y_px"]].to_numpy(float)
        x = self.readout.head_features(np.concatenate(parts), xy)
        return x, {norm: v.astype(np.float64) for norm, v in y.items()}


def neighbouring_spots(shards: ShardSet, spots: np.ndarray, quota: int, seed: int, section: int) -> np.ndarray:
    """Return at most ``quota`` of ``spots``, ascending: those nearest to a random spot, so that most keep their neighbours."""
    if spots.size <= quota:
        return spots
    xy = shards.spots.loc[spots, ["x_px", "y_px"]].to_numpy(float)
    centre = xy[int(generator(seed, "readout", section).integers(spots.size))]
    nearest = np.argsort(((xy - centre) ** 2).sum(1), kind="stable")[:quota]
    return np.sort(spots[nearest])
