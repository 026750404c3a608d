"""The section that a model is adapted to: its metadata, and features, positions and expression with one row per spot."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import numpy as np
from comtip_shards import ShardSet, SourceError
from comtip_shards.sections.duplicates import section_fingerprint
from comtip_shards.sections.facts import SourceOptions
from comtip_shards.sections.section import cohort_of
from comtip_shards.sources.anndata_parts.picture import library_names
from comtip_shards.storage.remote import is_url

from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.data.measured import MeasuredCounts, measured_counts
from comtip_fast.data.sections import SectionTiles, is_anndata, open_section, split_spec
from comtip_fast.data.tile_sources import TileGeometry
from comtip_fast.evaluation.train_reference import spot_inputs
from comtip_fast.inference import ImageFeatures, Predictor
from comtip_fast.inference.answers import species_of
from comtip_fast.inference.feature_store import FeatureColumns, FeatureStore
from comtip_fast.lineage import LEARNING, LineageSection, names_of_uses
from comtip_fast.models.readout.features import frozen_columns

log = logging.getLogger("comtip_fast")


@dataclass
class AdaptSection:
    """A section with N spots and the G trained genes of the model that it measured."""

    facts: LineageSection
    """Identity, donor and licence of the section for the lineage, with split ``train``."""
    cohort: str
    keys: list[str]
    xy_um: np.ndarray
    """Positions in um, float64 (N, 2)."""
    spot_ids: list[str]
    features: ImageFeatures
    """Features of the spots alone, without neighbours."""
    inputs: dict[str, dict[str, np.ndarray]]
    """{ridge baseline: {name of a candidate input: float64 (N, features)}}."""
    measured: dict[str, np.ndarray]
    """log1p expression (N, G), by normalisation."""
    covariates: np.ndarray
    """Mean colour and log total counts, float64 (N, 4), which are regressed out of partial correlations."""

    @property
    def views_NF(self) -> np.ndarray:
        """Tile features of the readout, without neighbours, float32 (N, F)."""
        assert self.features.readout_NF is not None
        return self.features.readout_NF


def read_section(
    predictor: Predictor, spec: str | Path | ad.AnnData, options: SourceOptions, fmt: str = "auto"
) -> AdaptSection:
    """Read tiles and counts of a SECTION, and encode the tiles.

    Parameters
    ----------
    predictor
        A model with a readout.
    spec
        A SECTION as for :func:`comtip_fast.data.sections.open_section`, with raw counts.
    options
        Facts (scale, image, species, ...) and options given by the caller. For input other than a shard set, tissue and donor are required.
    fmt
        Format of a source; ``auto`` detects it.

    Raises
    ------
    ValueError, FileNotFoundError
        The section does not exist or cannot be read, has no raw counts, states no donor or tissue, measured fewer than 2 of the
        model's trained genes, or is of unknown species.
    """
    readout = predictor.bundle.readout
    assert readout is not None
    geometry = TileGeometry(predictor.tile_px, predictor.tile_um, predictor.min_mpp)
    opened = open_section(spec, geometry, _tile_options(spec, options), fmt)
    species = species_of(predictor, opened.species, f"section {opened.section_id}")
    counts = measured_counts(spec, species, options, fmt)
    facts = _facts(spec, opened, species, options, counts)
    keys = [k for k in predictor.trained_genes if k in set(counts.keys)]
    if len(keys) < 2:
        raise ValueError(
            f"section {opened.section_id}: measured {len(keys)} of the model's {len(predictor.trained_genes)} trained genes, but "
            "adaptation needs at least 2; check the species, or use a model that was trained on genes of this section"
        )
    columns = counts.select(keys)[0]
    cp10k, raw = log1p_cp10k(counts.counts)[:, columns], counts.counts[:, columns]
    stain = opened.stain if predictor.normalises_stain else None
    features = predictor.image_features(opened.tiles, stain)
    if features.readout_NF is not None:
        features.readout_NF = features.readout_NF[:, : readout.settings.width(features.readout_NF.shape[1])]
    inputs = _ridge_inputs(predictor, opened, features)
    depth = np.log1p(np.asarray(counts.counts.sum(axis=1)).ravel())
    return AdaptSection(
        facts=facts,
        cohort=cohort_of(species, facts.tissue),
        keys=keys,
        xy_um=np.asarray(opened.template.obsm["spatial"], np.float64) * opened.mpp,
        spot_ids=[str(name) for name in opened.template.obs_names],
        features=features,
        inputs=inputs,
        measured={
            "cp10k": cp10k.toarray().astype(np.float64),
            "raw": np.log1p(raw.toarray().astype(np.float64)),
        },
        covariates=np.column_stack([inputs["ridge_colour"]["tile colour"], depth]),
    )


def seen_before(predictor: Predictor, section: LineageSection) -> dict[str, list[str] | None]:
    """Return which runs of the model used a section, or trained on its donor.

    Returns
    -------
    dict
        ``section_seen_by``, the runs that used the section for training or early stopping, and ``donor_seen_by``, the runs that
        trained on its donor (:meth:`comtip_fast.lineage.Lineage.runs_that_trained_on`). A value is None if it is unknown, for example
        because an ancestor was exported without lineage.
    """
    (uses,) = predictor.lineage.uses([section])
    used = names_of_uses(uses, LEARNING)
    known = used if used or predictor.lineage.parents_known else None
    return {"section_seen_by": known, "donor_seen_by": predictor.lineage.runs_that_trained_on(section.donor)}


def _ridge_inputs(
    predictor: Predictor, opened: SectionTiles, features: ImageFeatures
) -> dict[str, dict[str, np.ndarray]]:
    """Return the inputs, float64 with one row per spot, by ridge baseline and candidate (:attr:`AdaptSection.inputs`).

    ``features`` must not contain means over neighbouring spots.
    """
    readout = predictor.bundle.readout
    frozen: dict[str, FeatureStore] = {}
    if readout is not None and features.readout_NF is not None:
        columns = frozen_columns(predictor.model, readout.settings)
        frozen = {name: FeatureColumns(features.readout_NF, found) for name, found in columns.items()}
    stores = spot_inputs(predictor, opened.tiles, opened.stain, FeatureColumns(features.pooled_Nd), frozen)
    spots = np.arange(len(features.pooled_Nd))
    return {
        name: {label: np.asarray(store.read(spots), np.float64) for label, store in candidates.items()}
        for name, candidates in stores.items()
    }


def _facts(
    spec: str | Path | ad.AnnData,
    opened: SectionTiles,
    species: str,
    options: SourceOptions,
    counts: MeasuredCounts,
) -> LineageSection:
    """Return the lineage entry of the section, with split ``train``; tissue and donor must be known."""
    if _shards_of(spec) is not None:
        return lineage_section(spec, opened, species, options, counts)
    missing = [f"`{name}`" for name in ("tissue", "donor") if not getattr(options.facts, name)]
    if missing:
        verb, them = ("are", "both") if len(missing) == 2 else ("is", "it")
        raise SourceError(
            f"section {opened.section_id}: {' and '.join(missing)} {verb} not stated; state {them}, because the adapted "
            "model records tissue and donor, and evaluation reports sections of the same donor as seen"
        )
    found = lineage_section(spec, opened, species, options, counts)
    if not found.picture:
        log.warning(
            "section %s: no hires image in uns['spatial'], so the adapted model identifies the section only by its id; add the image "
            "and adapt again, or keep this id when you evaluate the model on the section",
            opened.section_id,
        )
    return found


def lineage_section(
    spec: str | Path | ad.AnnData,
    opened: SectionTiles,
    species: str,
    options: SourceOptions,
    counts: MeasuredCounts,
) -> LineageSection:
    """Return the lineage entry of a section, with split ``train``: of its shard set, or else of stated facts, counts and image.

    Without a hires image, it has no fingerprint, and :meth:`Lineage.uses` knows the section by its id only.
    """
    shards = _shards_of(spec)
    if shards is not None:
        meta = shards.manifest.sections[shards.section_number(opened.section_id)]
        return replace(LineageSection.of(meta), split="train")
    facts = options.facts
    return LineageSection(
        section_id=opened.section_id,
        dataset="adaptation",
        species=species,
        tissue=facts.tissue or "",
        donor=facts.donor or "",
        platform=facts.platform or "",
        licence=facts.licence or "",
        attribution=facts.attribution or "",
        split="train",
        n_spots=counts.counts.shape[0],
        **_fingerprint(opened, counts),
    )


def _fingerprint(opened: SectionTiles, counts: MeasuredCounts) -> dict[str, str]:
    """Return the fingerprint that identifies the section under another id; {} without a hires image."""
    spatial = opened.template.uns.get("spatial", {})
    images = [spatial[name].get("images", {}) for name in library_names(spatial)]
    picture = next((x["hires"] for x in images if "hires" in x), None)
    if picture is None:
        return {}
    pixels = np.asarray(picture)[..., :3]
    pixels = pixels if pixels.dtype == np.uint8 else np.clip(pixels * 255.0, 0, 255).astype(np.uint8)
    return section_fingerprint(counts.counts, counts.keys, pixels)


def _tile_options(spec: str | Path | ad.AnnData, options: SourceOptions) -> SourceOptions:
    """Return the options for reading tiles. For an AnnData, tiles are read without counts, and options for counts are removed."""
    if is_anndata(spec):
        return replace(options, counts=replace(options.counts, layer=None, round_counts=None))
    return options


def _shards_of(spec: str | Path | ad.AnnData) -> ShardSet | None:
    """Open the shard set of a SECTION; None if the SECTION is not in one."""
    if isinstance(spec, ad.AnnData):
        return None
    if is_url(str(spec)):
        return ShardSet(str(spec).rpartition(":")[0])
    path = split_spec(str(spec))[0]
    return ShardSet(path) if (path / "manifest.json").is_file() else None
