"""The Python interface: build shards, pretrain, evaluate, load, predict and embed; AnnData in, AnnData out.

The command line is a thin layer over these functions.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from comtip_shards import SourceError
from comtip_shards.genes.identifiers import GeneResource
from comtip_shards.sections.facts import CountOptions, PoolingOptions, SectionFacts

from comtip_fast._version import __version__
from comtip_fast.constants import LAYER_CP10K, LAYER_RAW, OBSM_EMBEDDING, UNS
from comtip_fast.data.measured import COUNT_OPTIONS, measured_counts
from comtip_fast.data.sections import H5AD_SUFFIXES, SectionTiles, TileGeometry, open_section, read_h5ad
from comtip_fast.evaluation.compare import joined_with_measured
from comtip_fast.evaluation.run import evaluate_run as evaluate
from comtip_fast.inference import GeneQuery, ImageFeatures, Predictor
from comtip_fast.pretraining import pretrain
from comtip_fast.runtime.devices import pick_device
from comtip_fast.shards import Facts, build_shards, open_sections, stated_text

__all__ = [
    "CountOptions",
    "Model",
    "PoolingOptions",
    "SectionFacts",
    "build_shards",
    "evaluate",
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
        A run folder or an export.
    device
        ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
    vectors
        File of gene vectors (``comtip genes vectors``), with which genes that were not trained are predicted.

    Raises
    ------
    FileNotFoundError, ValueError
        There is no export or file of gene vectors, or it has another format version or is damaged.

    Examples
    --------
    >>> import comtip_fast
    >>> model = comtip_fast.load("run")
    >>> model.trained_genes[:2]
    ['human:ACTA2', 'human:B2M']
    """
    return Model(Predictor.load(path, pick_device(device), vectors), str(path))


class Model:
    """A trained CoMTIP model; takes sections and returns AnnData."""

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
    ) -> ad.AnnData:
        """Predict expression of a section from its tiles.

        Parameters
        ----------
        section
            ``SHARDS_DIR:section_id``, a source folder, an ``.h5ad``, or an AnnData with an image.
        genes
            Symbols, Ensembl ids or previous symbols, also of genes that were not trained; ``None`` selects the trained
            genes of the section's species.
        facts, pooling, counts
            Facts about the section (``SectionFacts(mpp=0.5)`` or ``{"mpp": 0.5}``), and options for pooling and for
            counts and positions in an AnnData.

        Returns
        -------
        AnnData
            ``X`` and ``layers["log1p_cp10k"]``: float32 log1p of counts per 10,000; ``layers["log1p_raw"]``: log1p of counts
            at the depth of the training sections. ``var`` has the columns ``found_by`` (how the identifier was resolved),
            ``ensembl``, ``training`` (``trained``, ``trained by a parent``, ``held out`` or ``never seen``) and
            ``validation_pcc`` (mean PCC on the validation sections of the run; NaN without). ``obs_names`` are those of the
            section.

        Raises
        ------
        ValueError, FileNotFoundError
            The section or the genes cannot be used.

        Examples
        --------
        >>> import comtip_fast
        >>> predicted = comtip_fast.load("run").predict("set:x1", ["ERBB2", "TTN"])
        >>> predicted.shape, predicted.var["training"].tolist()
        ((49, 2), ['trained', 'never seen'])
        """
        return self._predict(open_section(section, self.tile, stated_text(facts, pooling, counts)), genes)

    def compare(
        self,
        section: str | Path | ad.AnnData,
        genes: Sequence[str] | None = None,
        *,
        facts: Facts = None,
        pooling: PoolingOptions | None = None,
        counts: CountOptions | None = None,
    ) -> ad.AnnData:
        """Join predicted and measured expression of a section that has counts, and score each gene.

        Parameters
        ----------
        section, genes, facts, pooling, counts
            As in :meth:`predict`; the section has raw counts.

        Returns
        -------
        AnnData
            The result of :meth:`predict` with the layers ``measured_log1p_cp10k`` and ``measured_log1p_raw`` (float32; NaN
            for genes that the section did not measure). ``var`` has the further columns ``measured`` (bool), ``detection``
            (share of spots), ``pcc``, ``pcc_partial`` (mean tile colour and log total counts regressed out) and
            ``pcc_raw``; NaN where undefined. For nulls and baselines, see :func:`comtip_fast.evaluate`.

        Raises
        ------
        ValueError, FileNotFoundError
            The section or the genes cannot be used, or the section has no raw counts or measured none of the genes.

        Examples
        --------
        >>> import comtip_fast
        >>> joined = comtip_fast.load("run").compare("set:x1", ["ERBB2", "TTN"])
        >>> sorted(joined.layers), joined.var["measured"].tolist()
        (['log1p_cp10k', 'log1p_raw', 'measured_log1p_cp10k', 'measured_log1p_raw'], [True, False])
        """
        options = stated_text(facts, pooling, counts)
        in_memory = isinstance(section, ad.AnnData) or str(section).endswith(H5AD_SUFFIXES)
        # Tiles are cut without reading counts, where the options that select counts would be refused.
        for_tiles = {k: v for k, v in options.items() if not (in_memory and k in COUNT_OPTIONS)}
        opened = open_section(section, self.tile, for_tiles)
        answer = self._predict(opened, genes)
        joined_with_measured(answer, measured_counts(section, self._species(opened), options), opened.tiles_NSS3)
        return answer

    def _predict(self, opened: SectionTiles, genes: Sequence[str] | None) -> ad.AnnData:
        var, queries = self._queries(genes, self._species(opened))
        out = self.predictor.predict(self._features(opened), queries)
        data = opened.template.copy()
        answer = ad.AnnData(X=out["cp10k"], obs=data.obs, var=var, obsm=dict(data.obsm), uns=dict(data.uns))
        answer.layers[LAYER_CP10K], answer.layers[LAYER_RAW] = out["cp10k"].copy(), out["raw"]
        answer.uns[UNS] = self._provenance(opened)
        return answer

    def embed(
        self,
        section: str | Path | ad.AnnData,
        *,
        facts: Facts = None,
        pooling: PoolingOptions | None = None,
        counts: CountOptions | None = None,
    ) -> ad.AnnData:
        """Embed the tiles of a section in the shared space.

        Parameters
        ----------
        section, facts, pooling, counts
            As in :meth:`predict`.

        Returns
        -------
        AnnData
            The section (a copy, if it is an AnnData) with ``obsm["X_comtip"]``: float32 unit vectors (spots, D).

        Examples
        --------
        >>> import comtip_fast
        >>> comtip_fast.load("run").embed("set:x1").obsm["X_comtip"].shape
        (49, 32)
        """
        opened = open_section(section, self.tile, stated_text(facts, pooling, counts))
        if isinstance(section, ad.AnnData):
            data = section.copy()
        elif str(section).endswith(H5AD_SUFFIXES):
            data = read_h5ad(Path(section))
        else:
            data = opened.template.copy()
        data.obsm[OBSM_EMBEDDING] = self._features(opened, readout=False).vector_ND
        data.uns[UNS] = self._provenance(opened)
        return data

    def _species(self, opened: SectionTiles) -> str:
        """Return the species of a section; one that is not known must be the only one that the model was trained on."""
        if opened.species:
            return opened.species
        trained = sorted({key.split(":")[0] for key in self.trained_genes})
        if len(trained) == 1:
            log.warning("section %s does not state its species: taken as %s", opened.section_id, trained[0])
            return trained[0]
        raise SourceError(
            f"section {opened.section_id}: no species, and the model was trained on {' and '.join(trained)}; set --species"
        )

    def _features(self, opened: SectionTiles, *, readout: bool = True) -> ImageFeatures:
        xy = np.asarray(opened.template.obsm["spatial"], np.float64)
        tiles = opened.tiles_NSS3.transpose(0, 3, 1, 2)
        return self.predictor.image_features(tiles, opened.stain, xy, readout=readout)

    def _provenance(self, opened: SectionTiles) -> dict[str, str]:
        vectors = self.predictor.vectors
        lineage = self.predictor.lineage
        facts = {"version": __version__, "model": self.predictor.config.name, "species": opened.species}
        runs = " > ".join(lineage.labels())
        facts["lineage"] = runs if lineage.parents_known else f"unknown > {runs}"
        facts["training_licences"] = "; ".join(lineage.licences())
        if vectors is not None:
            facts |= {"gene_vectors": vectors.sha256, "gene_vectors_licence": str(vectors.header.get("licence", ""))}
        return facts

    def _queries(self, genes: Sequence[str] | None, species: str) -> tuple[pd.DataFrame, list[GeneQuery]]:
        known = {g.key: g for g in self.predictor.bundle.genes}
        if genes is None:
            rows = [known[k] for k in self.trained_genes if not species or k.startswith(f"{species}:")]
            asked = [_Asked(g.symbol, g.key, g.symbol, g.ensembl, g.name, "model") for g in rows]
            if not asked:
                raise ValueError(
                    f"the model has no trained genes of species {species}; name genes to predict (--genes)"
                )
        else:
            asked = [self._resolve(g, species) for g in genes]
        if not asked:
            raise ValueError("genes: the list is empty; name genes to predict")
        scores = self.predictor.lineage.own.gene_scores
        var = pd.DataFrame(
            {
                "key": [a.key for a in asked],
                "symbol": [a.symbol for a in asked],
                "ensembl": [a.ensembl for a in asked],
                "name": [a.name for a in asked],
                "found_by": [a.found_by for a in asked],
                "training": [self.predictor.training_of(a.key) for a in asked],
                "validation_pcc": np.array([scores.get(a.key, np.nan) for a in asked], np.float64),
            },
            index=pd.Index(_unique([a.gene for a in asked]), dtype=object),
        )
        return var, [GeneQuery(a.symbol, a.name, a.key) for a in asked]

    def _resolve(self, gene: str, species: str) -> _Asked:
        species = species or ("mouse" if gene.upper().startswith("ENSMUSG") else "human")
        hit = GeneResource.load().resolve(gene, species)
        if hit.how == "unmapped":
            log.warning("gene %r: not in the table of %s genes; its sentence is the bare symbol", gene, species)
        return _Asked(gene, hit.key, hit.symbol or gene, hit.ensembl, hit.name, hit.how)


class _Asked(NamedTuple):
    """A gene to predict, and how its identifier was resolved."""

    gene: str
    key: str
    symbol: str
    ensembl: str
    name: str
    found_by: str


def _unique(names: list[str]) -> list[str]:
    duplicates = sorted(name for name, n in Counter(names).items() if n > 1)
    if duplicates:
        raise ValueError(f"duplicate genes: {', '.join(duplicates[:5])}; name each gene once")
    return np.asarray(names, dtype=object).tolist()
