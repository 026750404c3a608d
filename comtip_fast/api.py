"""The Python interface: functions that build shard sets, train and evaluate, and :class:`Model`, which predicts and embeds.

The command line calls these functions. Predictions and embeddings are AnnData objects.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from comtip_shards import SourceError
from comtip_shards.sections.facts import CountOptions, PoolingOptions, SectionFacts, check_trust, parse_facts
from comtip_shards.slides.tiles import StainStats, stain_stats

from comtip_fast.adaptation import adapt
from comtip_fast.adaptation.section import lineage_section, seen_before
from comtip_fast.constants import LAYER_CP10K, LAYER_RAW, OBSM_EMBEDDING, UNS
from comtip_fast.data.anndata_file import rows_copy
from comtip_fast.data.measured import measured_counts
from comtip_fast.data.sections import RECORDED_FACTS, SectionTiles, is_anndata, open_section, recorded_facts
from comtip_fast.data.tile_sources import ArrayTiles, TileGeometry
from comtip_fast.evaluation.compare import joined_with_measured, record_seen
from comtip_fast.evaluation.run import evaluate_run as evaluate
from comtip_fast.evaluation.tasks.run import evaluate_tasks
from comtip_fast.inference import Predictor, predict_section
from comtip_fast.inference.answers import cohorts_of, gene_queries, provenance, single, species_of
from comtip_fast.pretraining import pretrain
from comtip_fast.runtime.devices import pick_device
from comtip_fast.shards import Facts, build_shards, open_sections, stated_options
from comtip_fast.slide_prediction import GridOptions, SlideRequest, fit_tiles, predict_slide

__all__ = [
    "CountOptions",
    "GridOptions",
    "Model",
    "PoolingOptions",
    "SectionFacts",
    "adapt",
    "build_shards",
    "evaluate",
    "evaluate_tasks",
    "load",
    "open_sections",
    "pretrain",
]

log = logging.getLogger("comtip_fast")


def load(path: str | Path, device: str = "auto", vectors: str | Path | None = None) -> Model:
    """Load a trained model from a run folder or an export folder; nothing is unpickled.

    Parameters
    ----------
    path
        Folder of a finished run or of an export.
    device
        ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
    vectors
        File of gene vectors (``comtip genes vectors``), to predict genes that were not trained; None loads no vectors.

    Raises
    ------
    FileNotFoundError, ValueError
        The export or the gene vectors are missing, damaged or of another format version, or there is no such device.

    Examples
    --------
    >>> import comtip_fast
    >>> model = comtip_fast.load("run")
    >>> model.trained_genes[:2]
    ['human:ACTA2', 'human:B2M']
    """
    return Model(Predictor.load(path, pick_device(device), vectors), str(path))


class Model:
    """A trained CoMTIP model, as returned by :func:`load`; its methods take sections, slides or tiles and return AnnData."""

    def __init__(self, predictor: Predictor, source: str = "") -> None:
        self.predictor, self.source = predictor, source
        self.tile = TileGeometry(predictor.tile_px, predictor.tile_um, predictor.min_mpp)

    @property
    def trained_genes(self) -> list[str]:
        """Keys of the trained genes, e.g. ``human:ERBB2``."""
        return list(self.predictor.trained_genes)

    def predict(
        self,
        section: str | Path | ad.AnnData,
        genes: Sequence[str] | None = None,
        *,
        facts: Facts = None,
        pooling: PoolingOptions | None = None,
        counts: CountOptions | None = None,
        fmt: str = "auto",
    ) -> ad.AnnData:
        """Predict expression of a section from its tiles.

        Parameters
        ----------
        section
            ``SHARDS:section_id`` (``SHARDS`` is a folder or URL), a source folder, an ``.h5ad`` or ``FILE.h5ad:section_id``, or an
            AnnData with an image.
        genes
            Symbols, Ensembl ids or previous symbols, including those of genes that were not trained; ``None`` selects the trained
            genes of the section's species.
        facts, pooling, counts
            Facts about the section (``SectionFacts(mpp=0.5)`` or ``{"mpp": 0.5}``), and options for pooling and for
            counts and positions in an AnnData. The tissue selects the head of the readout, as in an evaluation. A stated
            tissue, donor, platform, licence or attribution is recorded in ``uns["comtip"]``.
        fmt
            Format of a source folder, see :func:`comtip_shards.sources.open_source`.

        Returns
        -------
        AnnData
            ``X`` and ``layers["log1p_cp10k"]``: float32 log1p of counts per 10,000; ``layers["log1p_raw"]``: log1p of counts
            at the depth of the training sections. ``var`` has the columns ``key``, ``symbol``, ``ensembl``, ``name``,
            ``found_by`` (how the identifier was resolved), ``training`` (``trained``, ``trained by a parent``,
            ``orthologue trained``, ``held out`` or ``never seen``), ``validation_pcc`` (mean PCC; NaN if no run scored the gene)
            and ``validation_on`` (what it was scored on: the validation sections of a run, or the test spots of a section that
            the model was adapted to).
            ``obs_names`` are those of the section. ``uns["comtip"]["readout"]`` names the cohorts (species and organ) whose heads
            of the readout predicted the section; several if its tissue is unknown or was not trained.

        Raises
        ------
        ValueError, FileNotFoundError
            The section is missing or cannot be read, a fact is missing or invalid, or ``genes`` is empty or has duplicates.

        Examples
        --------
        >>> import comtip_fast
        >>> predicted = comtip_fast.load("run").predict("set:x1", ["ERBB2", "TTN"])
        >>> predicted.shape, predicted.var["training"].tolist()
        ((49, 2), ['trained', 'never seen'])
        """
        opened = open_section(section, self.tile, stated_options(facts, pooling, counts), fmt)
        return self._predict(opened, genes)

    def compare(
        self,
        section: str | Path | ad.AnnData,
        genes: Sequence[str] | None = None,
        *,
        facts: Facts = None,
        pooling: PoolingOptions | None = None,
        counts: CountOptions | None = None,
        fmt: str = "auto",
    ) -> ad.AnnData:
        """Join predicted and measured expression of a section that has counts, and score each gene.

        Parameters
        ----------
        section, genes, facts, pooling, counts, fmt
            As in :meth:`predict`; the section has raw counts.

        Returns
        -------
        AnnData
            The result of :meth:`predict` with the layers ``measured_log1p_cp10k`` and ``measured_log1p_raw`` (float32; NaN
            for genes that the section did not measure). ``var`` has the further columns ``measured`` (bool), ``detection``
            (share of spots with a positive count), ``pcc``, ``pcc_partial`` (mean tile colour and log total counts regressed
            out) and ``pcc_raw``; NaN where undefined. For nulls and baselines, see :func:`comtip_fast.evaluate`.
            ``uns["comtip"]`` has ``section_seen_by`` and ``donor_seen_by``: the runs that learnt from the section, and those that
            trained on its donor (``none`` or ``unknown`` if there are none, or if it is not known); a warning names them, because the
            scores are then not scores on new data. Outside of a shard set, a section is recognised by counts and image, and its donor
            is a fact to state.

        Raises
        ------
        ValueError, FileNotFoundError
            As for :meth:`predict`, or the section has no raw counts or measured none of the genes.

        Examples
        --------
        >>> import comtip_fast
        >>> joined = comtip_fast.load("run").compare("set:x1", ["ERBB2", "TTN"])
        >>> sorted(joined.layers), joined.var["measured"].tolist()
        (['log1p_cp10k', 'log1p_raw', 'measured_log1p_cp10k', 'measured_log1p_raw'], [True, False])
        """
        options = stated_options(facts, pooling, counts)
        # Tiles are cut without reading counts, so the options that select counts would raise an error here.
        in_memory = is_anndata(section)
        without_counts = replace(options.counts, layer=None, round_counts=None)
        opened = open_section(
            section, self.tile, replace(options, counts=without_counts) if in_memory else options, fmt
        )
        answer = self._predict(opened, genes)
        species = species_of(self.predictor, opened.species, f"section {opened.section_id}")
        measured = measured_counts(section, species, options, fmt)
        joined_with_measured(answer, measured, opened.tiles)
        seen = seen_before(self.predictor, lineage_section(section, opened, species, options, measured))
        record_seen(answer, opened.section_id, seen)
        return answer

    def _predict(self, opened: SectionTiles, genes: Sequence[str] | None) -> ad.AnnData:
        where = f"section {opened.section_id}"
        species = species_of(self.predictor, opened.species, where)
        cohorts = cohorts_of(self.predictor, species, opened.tissue, where)
        var, queries = gene_queries(self.predictor, genes, species)
        xy = np.asarray(opened.template.obsm["spatial"], np.float64)
        out = predict_section(self.predictor, opened.tiles, self._stain(opened), xy, queries, single(cohorts))
        data = opened.template.copy()
        answer = ad.AnnData(X=out["cp10k"], obs=data.obs, var=var, obsm=dict(data.obsm), uns=dict(data.uns))
        answer.layers[LAYER_CP10K], answer.layers[LAYER_RAW] = out["cp10k"].copy(), out["raw"]
        answer.uns[UNS] = provenance(self.predictor, opened.species, opened.stated, cohorts)
        return answer

    def embed(
        self,
        section: str | Path | ad.AnnData,
        *,
        facts: Facts = None,
        pooling: PoolingOptions | None = None,
        counts: CountOptions | None = None,
        fmt: str = "auto",
    ) -> ad.AnnData:
        """Embed the tiles of a section in the shared space.

        Parameters
        ----------
        section, facts, pooling, counts, fmt
            As in :meth:`predict`.

        Returns
        -------
        AnnData
            The section (a copy, if it is an AnnData) with ``obsm["X_comtip"]``: float32 unit vectors (spots, D).

        Raises
        ------
        ValueError, FileNotFoundError
            The section does not exist or cannot be read, or a fact is missing or invalid.

        Examples
        --------
        >>> import comtip_fast
        >>> comtip_fast.load("run").embed("set:x1").obsm["X_comtip"].shape
        (49, 32)
        """
        opened = open_section(section, self.tile, stated_options(facts, pooling, counts), fmt)
        data = opened.template.copy()
        if opened.rows is not None:
            data = rows_copy(section, opened.rows, data.uns["spatial"])
        stain = self._stain(opened)
        vectors = np.empty((len(opened.tiles), self.predictor.config.align.dim), np.float32)
        for rows, tiles in opened.tiles.ahead():
            vectors[rows] = self.predictor.encode(tiles, stain, readout=False).vector_nD
        data.obsm[OBSM_EMBEDDING] = vectors
        data.uns[UNS] = provenance(self.predictor, opened.species, opened.stated)
        return data

    def predict_slide(
        self,
        slide: str | Path,
        genes: Sequence[str] | None = None,
        *,
        out: str | Path | None = None,
        facts: Facts = None,
        grid: GridOptions | None = None,
        progress: bool = False,
    ) -> ad.AnnData:
        """Predict expression on the tissue of an image without spots.

        Tissue is detected at low resolution and covered with a grid of tiles, which are read, encoded and predicted in pieces.
        If the process is killed, the same call with the same ``out`` resumes from the finished pieces.

        Parameters
        ----------
        slide
            Image or whole-slide file.
        genes
            As in :meth:`predict`.
        out
            The ``.h5ad`` to write, which may be larger than memory; None returns the result in memory.
        facts
            ``mpp`` (default: the scale of the file), ``trust_mpp``, ``species`` and ``tissue``, which selects the head of the linear
            readout. Tissue, donor, platform, licence and attribution are recorded in ``uns["comtip"]``; other facts raise an error.
        grid
            Lattice, step and smallest share of tissue (``GridOptions(shape="hexagonal", step_um=100)``); None uses the defaults.
        progress
            Show a progress bar on a terminal; without a terminal, log the progress.

        Returns
        -------
        AnnData
            As from :meth:`predict`, with one row per tile. ``obsm["spatial"]`` has the tile centres in px of the slide, and
            ``obs["tissue"]`` the share of tissue. With ``out``, the AnnData is backed by this file.

        Raises
        ------
        ValueError, FileNotFoundError
            The slide cannot be read or shows no tissue, its scale is neither in the file nor in ``facts``, a fact is invalid or has
            no effect on a slide, the grid has too many tiles, ``genes`` is empty or has duplicates, or ``out`` is not an ``.h5ad``
            in an existing folder.
        FileExistsError
            Another process writes ``out``, or the folder of its pieces contains other files.

        Examples
        --------
        >>> import comtip_fast
        >>> predicted = comtip_fast.load("run").predict_slide("sections/x1.png", ["ERBB2", "TTN"], facts={"mpp": 5.0})
        >>> predicted.shape, predicted.obsm["spatial"][0].tolist()
        ((49, 2), [22.4, 22.4])
        """
        request = self._slide_request(Path(slide), genes, facts, grid or GridOptions(), progress)
        if out is not None:
            if Path(out).suffix != ".h5ad":
                raise ValueError(f"`out` {out}: the output is an AnnData file; give a name that ends in .h5ad")
            if not Path(out).parent.is_dir():
                raise ValueError(
                    f"`out` {out}: {Path(out).parent} is not an existing folder; create it, or give another path"
                )
            predict_slide(self.predictor, Path(slide), Path(out), request)
            return ad.read_h5ad(out, backed="r")
        with tempfile.TemporaryDirectory() as folder:
            predict_slide(self.predictor, Path(slide), Path(folder) / "slide.h5ad", request)
            return ad.read_h5ad(Path(folder) / "slide.h5ad")

    def predict_tiles(
        self,
        tiles: np.ndarray,
        mpp: float,
        genes: Sequence[str] | None = None,
        *,
        species: str | None = None,
        tissue: str | None = None,
        xy: np.ndarray | None = None,
        stain: StainStats | None = None,
    ) -> ad.AnnData:
        """Predict expression of tiles in memory.

        The tiles are treated as one section: stain statistics and the standardisation of features are taken over all of
        them, so give all tiles of a slide at once.

        Parameters
        ----------
        tiles
            uint8 RGB (N, H, H, 3), at least as wide as the model's tiles; the centre is used.
        mpp
            um per px of the tiles.
        genes
            As in :meth:`predict`.
        species
            ``human`` or ``mouse``; may be None if the model was trained on one species, which is then used.
        tissue
            Selects the head of the readout; None uses the mean over the heads of the species.
        xy
            Centres of the tiles (N, 2) in any unit, which determine neighbours; None predicts without neighbours.
        stain
            Stain statistics of the slide; None computes them from the tiles.

        Returns
        -------
        AnnData
            As from :meth:`predict`, with ``obs_names`` ``0``, ``1``, ...

        Raises
        ------
        TypeError, ValueError
            The tiles, their scale, the positions or the genes cannot be used.

        Examples
        --------
        >>> import comtip_fast
        >>> import numpy as np
        >>> tiles = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
        >>> comtip_fast.load("run").predict_tiles(tiles, mpp=3.5, genes=["ERBB2"]).shape
        (9, 1)
        """
        fitted = fit_tiles(tiles, mpp, self.tile)
        positions = None if xy is None else np.asarray(xy, np.float64)
        if positions is not None and positions.shape != (len(fitted), 2):
            raise ValueError(
                f"xy of shape {positions.shape}: expected ({len(fitted)}, 2) for {len(fitted)} tiles; pass the centre of every tile"
            )
        if positions is not None and not np.isfinite(positions).all():
            lost = int((~np.isfinite(positions)).any(1).sum())
            raise ValueError(
                f"xy: {lost} of {len(fitted)} positions are not finite; leave out these tiles, or correct their positions"
            )
        found, _, _ = parse_facts({"species": species, "tissue": tissue})
        kind = species_of(self.predictor, found.species or "", "the tiles")
        cohorts = cohorts_of(self.predictor, kind, found.tissue or "", "the tiles")
        var, queries = gene_queries(self.predictor, genes, kind)
        if stain is None and self.predictor.normalises_stain:
            stain = stain_stats(fitted)
        out = predict_section(self.predictor, ArrayTiles(fitted), stain, positions, queries, single(cohorts))
        obs = pd.DataFrame(index=pd.Index([str(i) for i in range(len(fitted))], dtype=object))
        answer = ad.AnnData(X=out["cp10k"], obs=obs, var=var, obsm={} if positions is None else {"spatial": positions})
        answer.layers[LAYER_CP10K], answer.layers[LAYER_RAW] = out["cp10k"].copy(), out["raw"]
        answer.uns[UNS] = provenance(self.predictor, kind, SectionFacts(mpp=mpp, tissue=found.tissue), cohorts)
        return answer

    def _slide_request(
        self, slide: Path, genes: Sequence[str] | None, facts: Facts, grid: GridOptions, progress: bool
    ) -> SlideRequest:
        options = stated_options(facts, None, None)
        check_trust(options.facts)
        unused = [f"`{k}`" for k in options.stated() if k not in ("mpp", "trust_mpp", "species", *RECORDED_FACTS)]
        if unused:
            has, it = ("has", "it") if len(unused) == 1 else ("have", "them")
            raise SourceError(
                f"{slide}: {', '.join(unused)} {has} no effect here: a slide has no spots, no counts and no other image; leave {it} out"
            )
        kind = species_of(self.predictor, options.facts.species or "", f"slide {slide.name}")
        cohorts = cohorts_of(self.predictor, kind, options.facts.tissue or "", f"slide {slide.name}")
        var, queries = gene_queries(self.predictor, genes, kind)
        return SlideRequest(
            queries=queries,
            var=var,
            cohort=single(cohorts),
            provenance=provenance(self.predictor, kind, recorded_facts(options), cohorts),
            mpp=options.facts.mpp,
            trust_mpp=bool(options.facts.trust_mpp),
            grid=grid,
            progress=progress,
        )

    def _stain(self, opened: SectionTiles) -> StainStats | None:
        """Return the section's stain statistics, which may require all tiles; None if the model does not normalise stain."""
        return opened.stain if self.predictor.normalises_stain else None
