"""Inputs of the downstream tasks: features of all encoders, expression, labels and bootstrap weights, read once per section."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from comtip_shards import ShardSet
from comtip_shards.slides.tiles import StainStats, normalise_stain
from scipy import sparse

from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.data.tile_sources import ShardTiles
from comtip_fast.evaluation.encoders import TileEncoder
from comtip_fast.evaluation.feature_files import FeatureFiles
from comtip_fast.evaluation.gene_table import resolve_list
from comtip_fast.evaluation.tasks.gene_sets import GeneSets
from comtip_fast.evaluation.tasks.intervals import block_weights, spatial_blocks
from comtip_fast.evaluation.tasks.labels import LabelFile
from comtip_fast.evaluation.tasks.rows import TaskRow
from comtip_fast.evaluation.train_reference import TrainReference, mean_colour
from comtip_fast.evaluation.trained import TrainOptions
from comtip_fast.evaluation.trained.fit import TrainedMethod, fit_methods
from comtip_fast.inference import GeneQuery, ImageFeatures, Predictor
from comtip_fast.lineage import symbol_of
from comtip_fast.training.readout.fit import neighbouring_spots

log = logging.getLogger("comtip_fast")
ENCODER, VECTOR, COLOUR = "comtip encoder", "comtip vector", "colour"
PROBE_GENES = 50
"""Number of most variable genes that expression is scored on."""
MAX_SPOTS = 10_000
"""Default of ``max_spots``, limited because a section is kept in memory and retrieval compares all pairs of spots."""
Encoders = dict[str, TileEncoder | FeatureFiles]


@dataclass(frozen=True)
class TaskOptions:
    """Options of the tasks."""

    encoders: Encoders = field(default_factory=dict)
    """Further encoders to compare with, by name."""
    gene_sets: GeneSets = field(default_factory=dict)
    genes: tuple[str, ...] | None = None
    """Symbols or Ensembl ids; the first 50 that a section measured replace its 50 most variable genes."""
    labels: LabelFile | None = None
    """None uses the labels that the shard set stores."""
    n_bootstrap: int = 200
    """Draws of the bootstrap; 0 gives no intervals."""
    n_null: int = 20
    """Draws of the shuffled controls."""
    seed: int = 0
    train: TrainOptions = field(default_factory=TrainOptions)
    """Options for training the methods that are not in ``trained``."""
    trained: dict[str, TrainedMethod] = field(default_factory=dict)
    """{name: method that was trained already}."""
    max_spots: int = MAX_SPOTS
    """Largest number of spots per section; of a larger section, this many neighbouring spots are used."""


@dataclass
class SectionInputs:
    """One section, with N spots."""

    section_id: str
    number: int
    cohort: str
    spots: np.ndarray
    """int64 (N,), indices in the shard set."""
    xy_N2: np.ndarray
    """Positions in px of the source image."""
    spot_ids: list[str]
    cp10k: sparse.csr_matrix
    """log1p of counts per 10,000, for all genes of the shard set's gene table."""
    image: ImageFeatures
    features: dict[str, np.ndarray]
    """float (N, F) by name of the encoder."""
    weights_DN: np.ndarray
    """From :func:`comtip_fast.evaluation.tasks.intervals.block_weights`; no draws for a training section."""


class TaskContext:
    """Inputs of the tasks for one model and shard set; sections are read on first use and kept.

    Parameters
    ----------
    predictor
        The trained model.
    shards, numbers
        The shard set, and the numbers of the sections to score.
    train_shards
        The shard set with the training sections.
    options
        Options of the tasks.
    """

    def __init__(
        self,
        predictor: Predictor,
        shards: ShardSet,
        numbers: Sequence[int],
        train_shards: ShardSet,
        options: TaskOptions,
    ) -> None:
        self.predictor, self.shards, self.numbers, self.options = predictor, shards, list(numbers), options
        self.reference = TrainReference(predictor, train_shards)
        self._train_shards = train_shards
        self._read: dict[tuple[bool, int], SectionInputs] = {}
        self._trained = dict(options.trained)
        listed = options.genes
        self._listed = None if listed is None else {n: resolve_list(listed, shards, n)[0] for n in self.numbers}
        """Keys of the listed genes that each section measured, by number of the section."""
        self.probes: dict[int, list[TaskRow]] = {}
        """Rows of the task ``probe`` by section number, once computed."""

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row of each gene key in the gene table of the shard set."""
        return {g.key: i for i, g in enumerate(self.shards.genes)}

    @property
    def sections(self) -> list[SectionInputs]:
        """The sections to score."""
        return [self._section(self.shards, n, train=False) for n in self.numbers]

    def train_sections(self, cohort: str) -> list[SectionInputs]:
        """Return the sections of ``train_shards`` on which a cohort was trained; empty if there are none."""
        own = [n for n in self.reference.numbers if self._train_shards.cohort_of_section(n) == cohort]
        return [self._section(self._train_shards, n, train=True) for n in own]

    def ranked(self, cohort: str, number: int) -> list[str]:
        """Return gene keys by decreasing variance, see :meth:`TrainReference.ranked_genes`; ``number`` is the scored section."""
        return self.reference.ranked_genes(cohort, fallback=(self.shards, number))[0]

    def measured(self, number: int) -> set[str]:
        """Return the keys of the genes that a scored section measured."""
        return {g.key for g, m in zip(self.shards.genes, self.shards.measured(number), strict=True) if m}

    def trained_and_measured(self, cohort: str, numbers: Sequence[int]) -> list[str]:
        """Return the trained genes that all the sections measured, by decreasing variance; unranked genes follow, sorted by key."""
        common = set(self.predictor.trained_genes).intersection(*(self.measured(n) for n in numbers))
        ranked = [k for k in self.ranked(cohort, numbers[0]) if k in common]
        return list(dict.fromkeys([*ranked, *sorted(common)]))

    def values(self, section: SectionInputs, keys: Sequence[str]) -> np.ndarray:
        """Return log1p CP10K of genes of a scored section, float64 (N, G)."""
        return section.cp10k[:, [self.row_of[k] for k in keys]].toarray().astype(np.float64)

    def train_values(self, section: SectionInputs, keys: Sequence[str]) -> np.ndarray:
        """Return log1p CP10K of genes of a training section, float64 (N, G); 0 for a gene that ``train_shards`` lacks."""
        row = {g.key: i for i, g in enumerate(self._train_shards.genes)}
        out = np.zeros((len(section.spot_ids), len(keys)))
        known = [j for j, k in enumerate(keys) if k in row]
        out[:, known] = section.cp10k[:, [row[keys[j]] for j in known]].toarray()
        return out

    def train_measured(self, sections: Sequence[SectionInputs], keys: Sequence[str]) -> np.ndarray:
        """Return which genes each training section measured, bool (S, G)."""
        genes = [g.key for g in self._train_shards.genes]
        found = (dict(zip(genes, self._train_shards.measured(s.number), strict=True)) for s in sections)
        return np.array([[bool(measured.get(k, False)) for k in keys] for measured in found], bool)

    def trained(self, name: str) -> TrainedMethod:
        """Return a method of :data:`comtip_fast.evaluation.trained.METHODS`; the first call trains it, unless it was given."""
        if name not in self._trained:
            train = replace(self.options.train, methods=(name,))
            targets = {k for n in self.numbers for k in self.most_variable(self.shards.cohort_of_section(n), n)}
            (self._trained[name],) = fit_methods(train, self.predictor, self.reference, sorted(targets))
        return self._trained[name]

    def most_variable(self, cohort: str, number: int) -> list[str]:
        """Return the keys of the (up to) 50 most variable genes that a scored section measured; with a list, of its first 50."""
        if self._listed is not None:
            return self._listed[number][:PROBE_GENES]
        measured = self.measured(number)
        return [k for k in self.ranked(cohort, number) if k in measured][:PROBE_GENES]

    def unseen(self, section: SectionInputs) -> list[str]:
        """Return the keys of the (up to) 50 most variable held-out genes that a section measured; with a list, of its untrained genes."""
        if self._listed is not None:
            trained = self.predictor.trained_symbols
            return [k for k in self._listed[section.number] if symbol_of(k) not in trained][:PROBE_GENES]
        own = set(self.predictor.held_out_genes) & self.measured(section.number)
        ranked = [k for k in self.ranked(section.cohort, section.number) if k in own]
        return list(dict.fromkeys([*ranked, *sorted(own)]))[:PROBE_GENES]

    def tiles(self, section: SectionInputs) -> tuple[ShardTiles, StainStats]:
        """Return the tiles and the stain statistics of a scored section."""
        return ShardTiles(self.shards, section.spots), self.shards.stain(section.number)

    def queries(self, keys: Sequence[str]) -> list[GeneQuery]:
        """Return the queries that predict genes of the shard set."""
        facts = [self.shards.genes[self.row_of[k]] for k in keys]
        return [GeneQuery(g.symbol, g.name, g.key) for g in facts]

    def labels(self, section: SectionInputs) -> np.ndarray:
        """Return the labels of a scored section's spots, str (N,); empty text for a spot without a label."""
        if self.options.labels is not None:
            return self.options.labels.of(section.section_id, section.spot_ids)
        return self.shards.spots.loc[section.spots, "label"].fillna("").to_numpy(str)

    def _section(self, shards: ShardSet, number: int, *, train: bool) -> SectionInputs:
        if (train, number) not in self._read:
            self._read[train, number] = self._open(shards, number, train=train)
        return self._read[train, number]

    def _spots(self, shards: ShardSet, number: int) -> np.ndarray:
        """Return the spots of a section, or ``max_spots`` neighbouring spots if the section has more."""
        spots, most = shards.select(sections=[number]), self.options.max_spots
        if spots.size > most:
            name = shards.manifest.sections[number].section_id
            log.warning("section %s has %d spots; tasks use %d neighbouring ones", name, spots.size, most)
        return neighbouring_spots(shards, spots, most, self.options.seed, number)

    def _open(self, shards: ShardSet, number: int, *, train: bool) -> SectionInputs:
        """Read one section: features of all encoders, expression, and bootstrap weights if it is scored."""
        section_id, spots = shards.manifest.sections[number].section_id, self._spots(shards, number)
        tiles, stain = ShardTiles(shards, spots), shards.stain(number)
        frame = shards.spots.loc[spots]
        xy, names = frame[["x_px", "y_px"]].to_numpy(float), frame["spot_id"].astype(str).tolist()
        image = self.predictor.image_features(tiles, stain, xy, readout=not train)
        colour = np.zeros((len(names), 3))
        for rows, chunk in tiles.chunks():
            colour[rows] = mean_colour(normalise_stain(chunk, stain) if self.predictor.normalises_stain else chunk)
        features = {ENCODER: image.pooled_Nd, VECTOR: image.vector_ND, COLOUR: colour}
        for label, encoder in self.options.encoders.items():
            if isinstance(encoder, FeatureFiles):
                features[label] = encoder.of(section_id).rows_of(names, f"{encoder.path}, section {section_id}")
            else:
                features[label] = encoder.encode(tiles, stain)
        draws = 0 if train else self.options.n_bootstrap
        weights = (
            block_weights(spatial_blocks(xy), draws, seed=self.options.seed, section=section_id) if draws else xy[:0, 0]
        )
        return SectionInputs(
            section_id=section_id,
            number=number,
            cohort=shards.cohort_of_section(number),
            spots=spots,
            xy_N2=xy,
            spot_ids=names,
            cp10k=log1p_cp10k(shards.counts(spots)),
            image=image,
            features=features,
            weights_DN=weights,
        )
