"""Most variable genes and ridge baselines, computed on the training sections of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from comtip_shards import ShardSet, open_sets
from comtip_shards.sections.section import cohort_of
from comtip_shards.slides.tiles import StainStats, normalise_stain
from comtip_shards.storage.remote import is_url
from scipy import sparse

from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.data.expression.panel import rank_by_variance
from comtip_fast.data.tile_sources import ArrayTiles, ShardTiles, TileSource
from comtip_fast.evaluation.baselines import RidgeModel, fit_ridges
from comtip_fast.evaluation.folds import ridge_folds
from comtip_fast.inference import Predictor, SectionFeatures
from comtip_fast.inference.feature_store import FeatureColumns, FeatureStore
from comtip_fast.inference.section import row_blocks
from comtip_fast.lineage import LineageSection, same_sections
from comtip_fast.shards import ShardPaths, names_of_sets, shards_of_run

log = logging.getLogger("comtip_fast")
MIN_DETECTION = 0.1
"""Smallest detection rate of a ranked gene; not the setting of the run, so that runs are compared on the same genes."""
HVG_FROM_TRAINING, HVG_FROM_EVALUATED = "training sections", "evaluated section"

Inputs = dict[str, dict[str, FeatureStore]]
"""{baseline: {name of a candidate input: features (N, F), read in blocks of spots}}."""


@dataclass
class RidgeFit:
    """A fitted baseline: the chosen input, and one model per group of genes that the same sections measured."""

    input: str
    groups: list[tuple[np.ndarray, RidgeModel]]
    """Columns of the genes, and their model."""
    cv_pcc: float
    """Cross-validated mean PCC over the fitted genes; 0 if none is fitted."""

    @property
    def fitted(self) -> np.ndarray:
        """Columns of the fitted genes, int64, ascending: those that at least 10 training spots measured."""
        return np.sort(np.concatenate([np.zeros(0, np.int64), *(columns for columns, _ in self.groups)]))

    def predict(self, x: dict[str, FeatureStore], n_spots: int, columns: np.ndarray) -> np.ndarray:
        """Return the prediction of some of the genes, float64 (N, g); the inputs are read in blocks of spots.

        A gene that is not fitted is NaN everywhere.
        """
        out = np.full((n_spots, columns.size), np.nan)
        for rows in row_blocks(n_spots):
            values = np.asarray(x[self.input].read(rows), np.float64)
            for fitted, model in self.groups:
                _, of_out, of_model = np.intersect1d(columns, fitted, return_indices=True)
                out[np.ix_(rows, of_out)] = model.predict(values, of_model)
        return out

    def facts(self) -> dict[str, Any]:
        """Return the record of the fit in ``metrics.json``: the chosen input, alphas and cross-validated PCC."""
        return {"input": self.input, "alpha": sorted({m.alpha for _, m in self.groups}), "cv_mean_pcc": self.cv_pcc}


@dataclass
class _TrainData:
    """The training spots of one cohort."""

    section: np.ndarray
    """Section number of each spot."""
    xy: np.ndarray
    """Positions of the spots in px of their source image, (N, 2)."""
    cp10k: sparse.csr_matrix
    """log1p CP10K of all genes."""
    raw: sparse.csr_matrix
    """log1p of raw counts of all genes."""
    inputs: dict[str, dict[str, np.ndarray]]
    """Like :data:`Inputs`, but for all sections and in memory, because a fit needs all spots."""
    measured: dict[int, np.ndarray]
    """{section number: mask of the measured genes in the gene table}."""


def spot_inputs(
    predictor: Predictor,
    tiles: np.ndarray | TileSource,
    stain: StainStats,
    pooled: FeatureStore,
    frozen: Mapping[str, FeatureStore],
) -> Inputs:
    """Return the candidate inputs of each baseline: mean colour and image features.

    Mean colour is computed on the stored tiles and, if the model normalises stain, also on the stain-normalised tiles.

    Parameters
    ----------
    predictor
        The model.
    tiles
        uint8 (N, S, S, 3), or a source that reads them in chunks.
    stain
        Stain statistics of the section.
    pooled, frozen
        As in :class:`comtip_fast.inference.section.SectionFeatures`; if ``frozen`` is empty, the result has no ``ridge_frozen``.
    """
    source = tiles if isinstance(tiles, TileSource) else ArrayTiles(tiles)
    colours = {"tile colour": np.empty((len(source), 3))}
    if predictor.normalises_stain:
        colours["stain-normalised tile colour"] = np.empty((len(source), 3))
    for rows, chunk in source.chunks():
        for name, colour in colours.items():
            colour[rows] = mean_colour(chunk if name == "tile colour" else normalise_stain(chunk, stain))
    inputs: Inputs = {
        "ridge_colour": {name: FeatureColumns(colour) for name, colour in colours.items()},
        "ridge_features": {"encoder features": pooled},
    }
    if frozen:
        inputs["ridge_frozen"] = dict(frozen)
    return inputs


def training_shards(run: Path, configured: ShardPaths, given: ShardPaths | None) -> ShardSet:
    """Open the shard sets with the training sections as one set: ``given``, or else the sets that the run's config names.

    Raises
    ------
    ValueError
        The run's config names a URL, which is fetched only if it is ``given``, or a shard set cannot be read.
    FileNotFoundError
        A shard set does not exist.
    """
    if given is None:
        return open_sets(
            [_training_set(run, shards_of_run(run, name), stated=True) for name in names_of_sets(configured)]
        )
    return open_sets([_training_set(run, name, stated=False) for name in names_of_sets(given)])


def _training_set(run: Path, train: str, *, stated: bool) -> str:
    """Return ``train`` if it is a usable path or URL of a shard set, else raise; ``stated``: the run's config names it."""
    if stated and is_url(train):
        raise ValueError(
            f"{run}: its config names the training sections by the URL {train}, which is not fetched, because a model's "
            "config is not trusted; if you trust the URL, give all sets of the run with `train_shards`"
        )
    if not is_url(train) and not (Path(train) / "manifest.json").is_file():
        if not stated:
            raise FileNotFoundError(
                f"`train_shards` {train}: no shard set (manifest.json is missing); give the folder or URL of a shard set"
            )
        raise FileNotFoundError(
            f"{train}: the config of {run} names this path, but no shard set is there; the baselines are trained on the model's "
            "training sections, so give their shard set with `train_shards`"
        )
    return train


def check_tiles(predictor: Predictor, shards: ShardSet, train_shards: ShardSet) -> None:
    """Check that the tiles of both shard sets have the model's geometry: px, um and ``min_mpp``.

    Raises
    ------
    ValueError
        The tiles of one set have another geometry.
    """
    px, um, min_mpp = predictor.tile_px, predictor.tile_um, predictor.min_mpp
    build = f"build the set again with `tile_um={um:.12g}` `tile_px={px}` `min_mpp={min_mpp:.12g}`"
    give = "give the shard set that the model was trained on with `train_shards`"
    for found, fix in ((shards, build), (train_shards, give)):
        tile = found.manifest.tile
        if (tile.px, tile.um, tile.min_mpp) != (px, um, min_mpp):
            raise ValueError(
                f"{found.name}: tiles of {tile.um:.12g} um in {tile.px} px with min_mpp {tile.min_mpp:.12g}, but the model reads "
                f"{um:.12g} um in {px} px with min_mpp {min_mpp:.12g}; {fix}"
            )


def mean_colour(tiles_NSS3: np.ndarray) -> np.ndarray:
    """Return each tile's mean red, green and blue, 0 to 1, float64 (N, 3)."""
    mean: np.ndarray = tiles_NSS3.reshape(len(tiles_NSS3), -1, 3).mean(1) / 255.0
    return mean


def mean_colours(tiles: TileSource) -> np.ndarray:
    """Return :func:`mean_colour` of all tiles, read in chunks, float64 (N, 3)."""
    out = np.empty((len(tiles), 3))
    for rows, chunk in tiles.chunks():
        out[rows] = mean_colour(chunk)
    return out


class TrainReference:
    """The training sections of a model; each cohort is read once.

    Parameters
    ----------
    predictor
        The model.
    shards
        The shard set with the training sections. Training sections of the runs that the model started from are used too,
        if the set has them, because the baselines must see the same sections as the model. Sections are matched by
        :func:`comtip_fast.lineage.same_sections`, so that another section with the same id, for example a test section, is not
        trained on.
    """

    def __init__(self, predictor: Predictor, shards: ShardSet) -> None:
        self.predictor, self.shards = predictor, shards
        lineage = predictor.lineage
        trained = [s for run in (lineage.own, *lineage.ancestors) for s in run.sections if s.split == "train"]
        cohorts = [cohort_of(s.species, s.tissue) for s in trained]
        same = same_sections([LineageSection.of(s) for s in shards.manifest.sections], trained)
        # The cohort is compared too: without fingerprints, the same id in another organ is another section.
        found = {(i, j) for i, j in same if shards.cohort_of_section(i) == cohorts[j]}
        self.numbers = sorted({i for i, _ in found})
        present = {j for _, j in found}
        self._own: dict[str, list[tuple[str, bool]]] = {}
        """{cohort: (id, whether the set has it) of the training sections of the model's own run}."""
        for j in range(sum(s.split == "train" for s in lineage.own.sections)):
            self._own.setdefault(cohorts[j], []).append((trained[j].section_id, j in present))
        self._keys = [g.key for g in shards.genes]
        self._row = {k: i for i, k in enumerate(self._keys)}
        self._ranked: dict[str, list[str]] = {}
        self._data: dict[str, _TrainData | None] = {}
        self._fits: dict[tuple[str, str, str, tuple[str, ...]], RidgeFit | None] = {}

    def check(self, cohorts: Iterable[str]) -> None:
        """Check that the training sections of the given cohorts are in the shard set; log those that are missing.

        Raises
        ------
        ValueError
            A cohort was trained, but the shard set has none of its training sections, and none of the parents'.
        """
        for cohort in sorted(set(cohorts)):
            own = self._own.get(cohort, [])
            missing = sorted(section_id for section_id, present in own if not present)
            if not missing:
                continue
            # A model that was adapted or fine-tuned elsewhere may still have its parents' sections here.
            if len(missing) == len(own) and not self._cohort_sections(cohort):
                raise ValueError(
                    f"{self.shards.name} contains none of the training sections of {cohort} ({', '.join(missing)}), from "
                    "which the 50 most variable genes and the baselines are computed; give their shard set with `train_shards`"
                )
            log.warning(
                "%s lacks training sections of %s (%s): genes and baselines are computed from the others; "
                "give the complete set with `train_shards`",
                self.shards.name,
                cohort,
                ", ".join(missing),
            )

    def ranked_genes(self, cohort: str, *, fallback: tuple[ShardSet, int]) -> tuple[list[str], str]:
        """Return the keys of detected genes by decreasing variance, and the sections that the variance was computed on.

        These are the cohort's training sections (:data:`HVG_FROM_TRAINING`) or, if the shard set has none of them or no gene is
        detected in enough of their spots, the evaluated section ``fallback`` (:data:`HVG_FROM_EVALUATED`).
        """
        ranked = self._ranking(cohort)
        if ranked:
            return ranked, HVG_FROM_TRAINING
        shards, number = fallback
        values = log1p_cp10k(shards.counts(shards.select(sections=[number])))
        rows, _ = rank_by_variance([values], [shards.measured(number)], MIN_DETECTION)
        return [shards.genes[r].key for r in rows], HVG_FROM_EVALUATED

    def ridge(self, cohort: str, name: str, norm: str, keys: list[str]) -> RidgeFit | None:
        """Fit a ridge baseline on the cohort's training sections.

        Among the candidate inputs, the one with the highest cross-validated PCC on the training sections is used.

        Returns
        -------
        RidgeFit or None
            The fit, computed once; None if the shard set has no training sections of the cohort.
        """
        self.fit(cohort, name, norm, [keys])
        return self._fits[cohort, name, norm, tuple(keys)]

    def fit(self, cohort: str, name: str, norm: str, groups: Sequence[list[str]]) -> None:
        """Compute and keep the fits of :meth:`ridge` for several groups of genes, each with its own penalty.

        All groups share one decomposition of the inputs, which takes most of the time.
        """
        new = [keys for keys in groups if (cohort, name, norm, tuple(keys)) not in self._fits]
        data = self._load(cohort) if new else None
        fits = [] if data is None else [self._fit_groups(data, x, i, norm, new) for i, x in data.inputs[name].items()]
        for g, keys in enumerate(new):
            found = [of_input[g] for of_input in fits]
            self._fits[cohort, name, norm, tuple(keys)] = max(found, key=lambda f: f.cv_pcc) if found else None

    def _fit_groups(
        self, data: _TrainData, x: np.ndarray, name: str, norm: str, groups: Sequence[list[str]]
    ) -> list[RidgeFit]:
        """Fit the groups of genes to one input.

        Within a group, there is one model for the genes that the same training sections measured, if these have at least 10 spots.
        """
        values = data.cp10k if norm == "cp10k" else data.raw
        numbers, patterns = np.array(list(data.measured)), [self._measured_by(data, keys) for keys in groups]
        models: list[list[tuple[np.ndarray, RidgeModel]]] = [[] for _ in groups]
        for sections in np.unique(np.concatenate(patterns), axis=0):
            spots = np.isin(data.section, numbers[sections])
            columns = [np.flatnonzero((pattern == sections).all(1)) for pattern in patterns]
            own = [g for g, found in enumerate(columns) if found.size]
            if spots.sum() >= 10:
                rows = [[self._row[groups[g][c]] for c in columns[g]] for g in own]
                y = [values[spots][:, r].toarray() for r in rows]
                fold = ridge_folds(data.section[spots], data.xy[spots])
                for g, model in zip(own, fit_ridges(x[spots], y, data.section[spots], fold), strict=True):
                    models[g].append((columns[g], model))
        out = []
        for found in models:
            total = sum(c.size * model.cv_pcc for c, model in found)
            out.append(RidgeFit(name, found, float(total / max(1, sum(c.size for c, _ in found)))))
        return out

    def _measured_by(self, data: _TrainData, keys: list[str]) -> np.ndarray:
        """Return which training sections measured each gene, bool (G, sections)."""
        found = [[k in self._row and bool(m[self._row[k]]) for m in data.measured.values()] for k in keys]
        return np.array(found, bool).reshape(len(keys), len(data.measured))

    def _cohort_sections(self, cohort: str) -> list[int]:
        """Return the numbers of the cohort's training sections."""
        return [n for n in self.numbers if self.shards.cohort_of_section(n) == cohort]

    def _ranking(self, cohort: str) -> list[str]:
        """Return the cohort's detected genes by decreasing variance over its training sections, computed once."""
        if cohort not in self._ranked:
            own = self._cohort_sections(cohort)
            values = [log1p_cp10k(self.shards.counts(self.shards.select(sections=[n]))) for n in own]
            measured = [self.shards.measured(n) for n in own]
            rows = rank_by_variance(values, measured, MIN_DETECTION)[0].tolist() if own else []
            self._ranked[cohort] = [self._keys[r] for r in rows]
        return self._ranked[cohort]

    def _load(self, cohort: str) -> _TrainData | None:
        if cohort not in self._data:
            own = self._cohort_sections(cohort)
            self._data[cohort] = self._read(own) if own else None
        return self._data[cohort]

    def _read(self, numbers: list[int]) -> _TrainData:
        """Read expression and baseline inputs of the spots of some sections."""
        spots = self.shards.select(sections=numbers)
        section = self.shards.spots.loc[spots, "section"].to_numpy()
        counts = self.shards.counts(spots)
        raw = counts.astype(np.float64)
        raw.data = np.log1p(raw.data)
        parts: list[dict[str, dict[str, np.ndarray]]] = []
        for n in numbers:
            tiles, stain = ShardTiles(self.shards, spots[section == n]), self.shards.stain(n)
            with SectionFeatures(self.predictor, tiles, stain) as features:
                every = np.arange(len(tiles))
                stores = spot_inputs(self.predictor, tiles, stain, features.pooled, features.frozen)
                parts.append(
                    {k: {i: np.asarray(v.read(every), np.float64) for i, v in x.items()} for k, x in stores.items()}
                )
        inputs = {k: {i: np.concatenate([p[k][i] for p in parts]) for i in parts[0][k]} for k in parts[0]}
        xy, measured = self.shards.spots.loc[spots, ["x_px", "y_px"]], {n: self.shards.measured(n) for n in numbers}
        return _TrainData(section, xy.to_numpy(float), log1p_cp10k(counts), raw, inputs, measured)
