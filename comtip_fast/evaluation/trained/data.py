"""Training and validation spots of the trained methods: tiles from the loader of pretraining, and expression targets."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from comtip_shards import ShardSet
from scipy import sparse
from torch import Tensor

from comtip_fast.config.schema import RunConfig
from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.data.expression.training_tables import TrainingTables, training_tables
from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.data.loaders.factory import make_loader
from comtip_fast.evaluation.train_reference import TrainReference
from comtip_fast.evaluation.trained.targets import Targets
from comtip_fast.inference import Predictor
from comtip_fast.lineage import LEARNING, LineageSection, names_of_uses
from comtip_fast.runtime.devices import autocast
from comtip_fast.training.validation import KEPT_BYTES, evenly

log = logging.getLogger("comtip_fast")
COUNTS_AT_ONCE = 4096
TILES_AT_ONCE = 256
SCORED_GENES = 50
"""Number of most variable genes on which a validation section is scored."""


@dataclass
class ValidationSection:
    """One validation section with n spots and its H most variable target genes."""

    section_id: str
    cohort: str
    spots: np.ndarray
    """int64 (n,), indices in the shard set."""
    columns: np.ndarray
    """int64 (H,), columns of the targets."""
    measured_nH: np.ndarray
    """Measured log1p CP10K of the n spots and H genes."""
    kept: list[Tensor] = field(default_factory=list)
    """Encoder inputs by chunk, on the CPU; empty before the first use, or if all sections would exceed ``KEPT_BYTES``."""


class TrainingData:
    """Training and validation spots of all methods, read once.

    Parameters
    ----------
    predictor
        The model, whose tiles, stain, views and frozen stem are used.
    reference
        The training sections; methods are trained on those whose split in the shard set is ``train``.
    keys
        Gene keys to predict.
    config
        Config of the run; its seed determines the order of the spots and the views.

    Raises
    ------
    ValueError
        None of the training sections has split ``train`` in the shard set, or the loader of the config cannot be used.
    """

    def __init__(self, predictor: Predictor, reference: TrainReference, keys: Sequence[str], config: RunConfig) -> None:
        self.predictor, self.shards, self.config = predictor, reference.shards, config
        self.device = predictor.device
        sections = self.shards.manifest.sections
        self.numbers = [n for n in reference.numbers if sections[n].split == "train"]
        if not self.numbers:
            raise ValueError(
                f"{self.shards.name}: none of the model's training sections is of split 'train' here, but methods are trained "
                "on them; give the shard set that the model was trained on with `train_shards`"
            )
        self.cohorts = {self.shards.cohort_of_section(n) for n in self.numbers}
        tables = _of_sections(training_tables(self.shards, config), self.shards, self.numbers)
        stem = self._stem if predictor.model.vision.stem is not None else None
        self.loader: BaseLoader = make_loader(config, self.shards, tables, device=self.device, frozen_stem=stem)
        self.spots = tables.spots
        rows = {g.key: i for i, g in enumerate(self.shards.genes)}
        self._row_of = [rows.get(k, -1) for k in keys]
        self.targets = self._targets(list(keys))
        self.validation = [
            v for n in _validation_numbers(predictor, self.shards) for v in self._validation(n, reference)
        ]
        self._kept_bytes = 0

    @cached_property
    @torch.no_grad()
    def pooled_Nd(self) -> np.ndarray:
        """Mean patch features of the training spots from the model's encoder, without augmentation, float64 (N, d)."""
        parts = []
        for chunk in self.chunks(self.spots):
            with autocast(self.config.train.precision, self.device):
                parts.append(self.predictor.model.vision(chunk).pooled_Bd.float().cpu().numpy())
        return np.concatenate(parts).astype(np.float64)

    @property
    def section_ids(self) -> list[str]:
        """Ids of the training sections."""
        return [self.shards.manifest.sections[n].section_id for n in self.numbers]

    def batch_targets(self, spot_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the targets of training spots and a mask of the known targets, both (B, G) on the device."""
        z, known = self.targets.of_spots(np.searchsorted(self.spots, spot_index.cpu().numpy()))
        return torch.from_numpy(z).to(self.device), torch.from_numpy(known).to(self.device)

    def rows_of_cohort(self, cohort: str) -> np.ndarray:
        """Return the rows of a cohort's training spots in the targets, int64."""
        own = [i for i, n in enumerate(self.numbers) if self.shards.cohort_of_section(n) == cohort]
        return np.flatnonzero(np.isin(self.targets.section_N, own))

    def inputs(self, section: ValidationSection) -> Iterator[Tensor]:
        """Yield inputs of the image encoder for a validation section, in chunks on the device.

        Raises
        ------
        ValueError
            A tile is damaged.
        """
        if section.kept:
            yield from (part.to(self.device) for part in section.kept)
            return
        parts: list[Tensor] = []
        keep = True
        for part in self.chunks(section.spots):
            keep = keep and self._kept_bytes + part.nbytes <= KEPT_BYTES
            if keep:
                parts.append(part.cpu())
                self._kept_bytes += part.nbytes
            yield part
        if keep:
            section.kept = parts
        else:
            self._kept_bytes -= sum(part.nbytes for part in parts)

    def chunks(self, spots: np.ndarray) -> Iterator[Tensor]:
        """Yield inputs of the image encoder for spots of the shard set, without augmentation, in chunks on the device.

        Raises
        ------
        ValueError
            A tile is damaged.
        """
        for start in range(0, spots.size, TILES_AT_ONCE):
            chunk = spots[start : start + TILES_AT_ONCE]
            found, tiles = self.loader.tiles(chunk, np.zeros(chunk.shape, np.int64))
            if found.size < chunk.size:
                # Targets were read for these spots, so that rows would no longer agree.
                raise ValueError(
                    f"{self.shards.name}: a tile is damaged; run `comtip shards verify`, then rebuild the set"
                )
            yield self.predictor.model.vision.stem_features(tiles.to(self.device))

    def _targets(self, keys: list[str]) -> Targets:
        """Read the targets of the training spots."""
        section = self.shards.sections_of(self.spots)
        row = {n: i for i, n in enumerate(self.numbers)}
        return Targets.of(
            keys,
            np.array([row[int(s)] for s in section], np.int64),
            self._values(self.spots),
            self._known(self.numbers),
        )

    def _validation(self, number: int, reference: TrainReference) -> list[ValidationSection]:
        """Return a list of one validation section; empty if its cohort has no training sections or no gene can be scored."""
        cohort = self.shards.cohort_of_section(number)
        if cohort not in self.cohorts:
            return []
        measured, column = self._known([number])[0], {k: i for i, k in enumerate(self.targets.keys)}
        ranked, _ = reference.ranked_genes(cohort, fallback=(self.shards, number))
        known = [column[k] for k in ranked if k in column and measured[column[k]]]
        columns = np.array(known[:SCORED_GENES], np.int64)
        if not columns.size:
            return []
        spots = self.shards.select(sections=[number])
        spots = spots[evenly(spots.size, self.config.train.validate_spots)]
        values = self._values(spots)[:, columns].toarray()
        section_id = self.shards.manifest.sections[number].section_id
        return [ValidationSection(section_id, cohort, spots, columns, values)]

    def _known(self, numbers: Sequence[int]) -> np.ndarray:
        """Return which target genes each section measured, bool (S, G)."""
        rows = np.array(self._row_of)
        return np.stack([self.shards.measured(n)[rows] & (rows >= 0) for n in numbers])

    def _values(self, spots: np.ndarray) -> sparse.csr_matrix:
        """Return log1p CP10K (n, G) of the target genes; a gene that the set does not have is 0."""
        present = np.flatnonzero(np.array(self._row_of) >= 0)
        rows = np.array(self._row_of)[present]
        to_targets = sparse.csr_matrix(
            (np.ones(present.size, np.float32), (np.arange(present.size), present)), (present.size, len(self._row_of))
        )
        parts = [
            log1p_cp10k(self.shards.counts(spots[i : i + COUNTS_AT_ONCE]))[:, rows] @ to_targets
            for i in range(0, spots.size, COUNTS_AT_ONCE)
        ]
        return sparse.vstack(parts, "csr")

    @torch.no_grad()
    def _stem(self, tiles: Tensor) -> Tensor:
        """Return stem features of tiles, on the CPU, for the loader's table."""
        return self.predictor.model.vision.stem_features(tiles.to(self.device)).cpu()


def _validation_numbers(predictor: Predictor, shards: ShardSet) -> list[int]:
    """Return the numbers of the sections of split ``val``, except those that the model's runs had and did not learn from.

    A run that was extended by further shard sets uses none of their validation sections. These may therefore be scored, and a method
    that is stopped on them would be compared with the model on its own validation sections.
    """
    sections = shards.manifest.sections
    uses = predictor.lineage.uses([LineageSection.of(s) for s in sections])
    own = enumerate(zip(sections, uses, strict=True))
    return [n for n, (s, found) in own if s.split == "val" and (not found or names_of_uses(found, LEARNING))]


def _of_sections(tables: TrainingTables, shards: ShardSet, numbers: Sequence[int]) -> TrainingTables:
    """Return the tables with the training spots of the sections ``numbers`` only."""
    own = np.isin(shards.sections_of(tables.spots), numbers)
    levels = None if tables.levels is None else tables.levels[own]
    return replace(tables, spots=tables.spots[own], levels=levels)
