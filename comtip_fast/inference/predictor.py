"""A trained model that predicts expression from tiles; see :mod:`comtip_fast.inference`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from comtip_shards.slides.tiles import StainStats, normalise_stain
from torch import Tensor

from comtip_fast.data.tile_sources import ArrayTiles, TileSource
from comtip_fast.data.upload import PackedTensors, upload
from comtip_fast.export import Bundle
from comtip_fast.genes import GeneTokenizer
from comtip_fast.genes.tokens import GeneTokens, gene_tokens, take_genes, vector_rows
from comtip_fast.genes.vectors import GeneVectors
from comtip_fast.inference.levels import GENES_PER_CHUNK, GeneQuery, SentenceLevels, predict_chunks
from comtip_fast.lineage import symbol_of
from comtip_fast.models.readout.features import feature_width, tile_features
from comtip_fast.models.readout.section_statistics import neighbour_mean
from comtip_fast.runtime.devices import autocast

log = logging.getLogger("comtip_fast")
_OTHER_AXES = "the gene vectors do not extend those that the model was trained with (fewer than 2 common genes, or other values for them)"


@dataclass
class ImageFeatures:
    """Features of N tiles."""

    vector_ND: np.ndarray
    """float32 (N, D), unit vectors of the shared space."""
    pooled_Nd: np.ndarray
    """float32 (N, d), mean patch feature before projection."""
    readout_NF: np.ndarray | None = None
    """float32 (N, F), input of the readout; None without a readout, without tiles, or if it was not requested."""
    xy_N2: np.ndarray | None = None
    """Positions of the spots, if known."""


@dataclass
class EncodedTiles:
    """Features of a chunk of tiles, before neighbours are averaged."""

    vector_nD: np.ndarray
    pooled_nd: np.ndarray
    views_nF: np.ndarray | None
    """Features averaged over the readout's views; None if the model has no readout, or if these features were not requested."""


def _vectors_of(bundle: Bundle, given: GeneVectors | None) -> tuple[GeneVectors | None, GeneVectors | None]:
    """Return the vectors for the gene encoder, and the vectors with which the readout predicts genes that were not trained.

    Raise ValueError if the model cannot use the given vectors.
    """
    own = bundle.vectors
    further = None if own is None or given is None else own.extended_by(given)
    if given is not None and further is None and bundle.readout is None:
        train = "" if bundle.config.readout.kind != "levels" else "train with readout.kind=auto, or "
        raise ValueError(
            f"gene vectors were given, but the model has no readout to use them with; {train}load the model without gene "
            "vectors"
            if own is None
            else f"{_OTHER_AXES}, and the model has no readout to use them with; give a file that contains genes of the "
            "model's own vectors with the same values"
        )
    if own is not None and given is not None and further is None:
        log.warning("%s: the readout uses the given vectors, but gene sentences do not", _OTHER_AXES)
    return further or own, further or given or own


class Predictor:
    """A trained model that predicts expression from tiles.

    Parameters
    ----------
    bundle
        Contents of an export.
    device
        Device of the model.
    vectors
        Gene vectors, which allow the readout to predict genes that were not trained. If the export has gene vectors too, the given
        vectors add genes to them; if that is not possible, only the readout uses the given vectors, and a warning is logged.

    Raises
    ------
    ValueError
        The model cannot use the given gene vectors, or was trained with another tokenizer.
    """

    def __init__(self, bundle: Bundle, device: str | torch.device = "cpu", vectors: GeneVectors | None = None) -> None:
        self.bundle, self.device = bundle, torch.device(device)
        self.sentence_vectors, self.vectors = _vectors_of(bundle, vectors)
        self.given_vectors = vectors
        """The gene vectors that were given, if any; those of the export are ``bundle.vectors``."""
        self.config, self.model = bundle.config, bundle.model.to(self.device).eval()
        self.model.fuse_blocks(self.config.engine, self.device, trains=False)
        self.tokenizer = GeneTokenizer.load()
        if self.tokenizer.sha256 != bundle.tokenizer_sha256:
            version = bundle.lineage.own.comtip_fast
            raise ValueError(
                f"the export was written with another gene tokenizer (SHA-256 {bundle.tokenizer_sha256[:12]}) than that of this "
                f"comtip-fast ({self.tokenizer.sha256[:12]}); install comtip-fast {version or 'in the version that wrote it'}"
            )
        self.trained_genes = [g.key for g in bundle.genes if g.trained]
        self.lineage = bundle.lineage
        self._by_parents = {key for run in self.lineage.ancestors for key in run.trained_genes}
        by_parents = self.lineage.genes_of_ancestors()
        self.trained_symbols = by_parents | {symbol_of(key) for key in self.trained_genes}
        """Upper-case symbols of the genes that any run of the lineage trained; a gene with one of them is not unseen."""
        # A gene that a parent trained is not unseen, even if this run held it out.
        self.held_out_genes = [g.key for g in bundle.genes if g.held_out and symbol_of(g.key) not in by_parents]
        self._held_out = frozenset(self.held_out_genes)
        self.tile_px, self.tile_um, self.min_mpp = bundle.sizes.tile_px, bundle.tile_um, bundle.min_mpp
        self.normalises_stain = self.config.data.stain == "section"
        self.view_width = 0 if bundle.readout is None else feature_width(self.model, bundle.readout.settings)
        """Number of features per tile from :meth:`encode` for the readout; 0 without one."""
        self._row = {key: i for i, key in enumerate(self.trained_genes)}

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu", vectors: str | Path | None = None) -> Predictor:
        """Load from a run folder (its ``export/``) or from an export folder; ``vectors`` is a file of gene vectors.

        Raises
        ------
        FileNotFoundError, ValueError
            The folder, its export or the vectors do not exist or cannot be used.
        """
        folder = Path(path)
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist; give the folder of a finished run or an export")
        bundle = Bundle.load(folder / "export" if (folder / "export").is_dir() else folder)
        return cls(bundle, device, None if vectors is None else GeneVectors.load(vectors))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights, levels, readout and gene vectors."""
        found = hashlib.sha256()
        arrays = {
            k: v.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for k, v in self.model.state_dict().items()
        }
        parts = {k: v.numpy() for k, v in arrays.items()} | self.bundle.levels.to_arrays()
        if self.bundle.readout is not None:
            readout, header = self.bundle.readout.to_arrays()
            parts |= readout | {"readout": np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)}
        for name in sorted(parts):
            found.update(name.encode())
            found.update(np.ascontiguousarray(parts[name]).data)
        for vectors in (self.vectors, self.sentence_vectors):
            found.update(b"" if vectors is None else vectors.sha256.encode())
        return found.hexdigest()

    def training_of(self, key: str) -> str:
        """Return how the runs of the lineage used a gene.

        The result is ``trained``, ``trained by a parent``, ``orthologue trained`` (a run trained the gene of another species with
        the same symbol), ``held out`` or ``never seen``.
        """
        if key in self._row:
            return "trained"
        if key in self._by_parents:
            return "trained by a parent"
        if symbol_of(key) in self.trained_symbols:
            return "orthologue trained"
        return "held out" if key in self._held_out else "never seen"

    def has_vector(self, key: str) -> bool:
        """Return whether there is a gene vector for the gene."""
        return any(v is not None and key in v.row for v in (self.vectors, self.sentence_vectors))

    @torch.no_grad()
    def encode(self, tiles_NSS3: np.ndarray, stain: StainStats | None, *, readout: bool = True) -> EncodedTiles:
        """Encode a chunk of tiles under the run's precision.

        Parameters
        ----------
        tiles_NSS3
            uint8 tiles (n, S, S, 3).
        stain
            Stain statistics of the section, used if the model normalises stain; None leaves the tiles unchanged.
        readout
            Whether to compute the features of a readout; each tile is then encoded under ``readout.views`` views.
        """
        if self.normalises_stain and stain is not None:
            tiles_NSS3 = normalise_stain(tiles_NSS3, stain)
        x = upload(torch.from_numpy(np.ascontiguousarray(tiles_NSS3.transpose(0, 3, 1, 2))), self.device)
        heads, views = self.bundle.readout if readout else None, None
        with autocast(self.config.train.precision, self.device):
            if heads is None:
                out = self.model.encode_image(self.model.vision.stem_features(x))
            else:
                out, views = tile_features(self.model, x, heads.settings)
        found = [x.float() for x in (out.vector_BD, out.pooled_Bd, views) if x is not None]
        # One copy to the host, which waits for the device.
        parts = torch.cat(found, dim=1).cpu().split([x.shape[1] for x in found], dim=1)
        vector, pooled, *rest = (np.ascontiguousarray(part.numpy()) for part in parts)
        return EncodedTiles(vector, pooled, rest[0] if rest else None)

    def image_features(
        self,
        tiles: np.ndarray | TileSource,
        stain: StainStats | None,
        xy_N2: np.ndarray | None = None,
        *,
        readout: bool = True,
    ) -> ImageFeatures:
        """Encode the tiles of one section, a chunk at a time; all features are kept in memory.

        Parameters
        ----------
        tiles
            uint8 tiles (N, 3, S, S), or a source that reads them in chunks.
        stain
            As in :meth:`encode`.
        xy_N2
            Positions of the spots in any unit, which define the neighbours in the readout; None uses each spot alone.
        readout
            As in :meth:`encode`.
        """
        source = tiles if isinstance(tiles, TileSource) else ArrayTiles(np.asarray(tiles).transpose(0, 2, 3, 1))
        heads, n = self.bundle.readout if readout else None, len(source)
        vector_ND = np.zeros((n, self.config.align.dim), np.float32)
        pooled_Nd = np.zeros((n, self.model.vision.width), np.float32)
        if n == 0:
            return ImageFeatures(vector_ND, pooled_Nd)
        views_NF = None if heads is None else np.zeros((n, self.view_width), np.float32)
        for rows, chunk in source.ahead():
            encoded = self.encode(chunk, stain, readout=readout)
            vector_ND[rows], pooled_Nd[rows] = encoded.vector_nD, encoded.pooled_nd
            if views_NF is not None:
                views_NF[rows] = encoded.views_nF
        joined = None if heads is None or views_NF is None else heads.head_features(views_NF, xy_N2)
        return ImageFeatures(vector_ND, pooled_Nd, joined, xy_N2)

    def predict(
        self,
        features: ImageFeatures,
        genes: Sequence[GeneQuery],
        chunk: int = GENES_PER_CHUNK,
        cohort: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Predict expression of one section.

        For genes of the readout, the predictions of the readout and from level sentences are mixed. Other genes are
        predicted by the readout with gene vectors if these contain the gene. All remaining genes, and all genes if there is no
        readout or its features were not computed, are predicted from level sentences alone.

        Parameters
        ----------
        features
            From :meth:`image_features`.
        genes
            The G genes.
        chunk
            Number of genes per pass through the gene encoder.
        cohort
            ``species_organ``, whose heads are used; None uses the mean over the heads that predict the gene.

        Returns
        -------
        dict
            ``cp10k`` (log1p of counts per 10,000) and ``raw`` (log1p of counts), float32 (N, G).

        Raises
        ------
        ValueError
            The gene vectors have too few genes of the readout, see :meth:`comtip_fast.models.readout.heads.Readout.predict`.
        """
        readout = self.bundle.readout
        if readout is None or features.readout_NF is None:
            return self.predict_levels(features, genes, chunk)
        keys = [g.key or "" for g in genes]
        values, known = readout.predict(features.readout_NF, keys, cohort, self.vectors)
        weight = readout.levels_weight(keys, cohort)
        mixed = np.flatnonzero(weight > 0)
        if mixed.size:
            levels = self._smoothed_levels(features, [genes[i] for i in mixed.tolist()], chunk)
            for name, value in levels.items():
                values[name][:, mixed] = (1 - weight[mixed]) * values[name][:, mixed] + weight[mixed] * value
        rest = np.flatnonzero(~known)
        if rest.size:
            for name, value in self.predict_levels(features, [genes[i] for i in rest.tolist()], chunk).items():
                values[name][:, rest] = value
        return values

    def predict_levels(
        self, features: ImageFeatures, genes: Sequence[GeneQuery], chunk: int = GENES_PER_CHUNK
    ) -> dict[str, np.ndarray]:
        """Predict expression without the readout, from level sentences alone, ``chunk`` genes at a time.

        A level sentence is the text of a gene and one of its expression levels; the prediction is the expected value over the levels,
        see :mod:`comtip_fast.inference`. It is returned as by :meth:`predict`.
        """
        return predict_chunks(self.sentence_levels(genes, chunk), features.vector_ND)

    def sentence_levels(self, genes: Sequence[GeneQuery], chunk: int = GENES_PER_CHUNK) -> Iterator[SentenceLevels]:
        """Encode the sentences of genes under the run's precision, ``chunk`` genes at a time."""
        for start in range(0, len(genes), chunk):
            tokens, rows = self._tokens(genes[start : start + chunk])
            with autocast(self.config.train.precision, self.device):
                table = SentenceLevels.of(self.model, tokens, self.bundle.levels, rows)
            yield table  # outside of autocast, which would otherwise stay active in the caller

    def _smoothed_levels(
        self, features: ImageFeatures, genes: Sequence[GeneQuery], chunk: int
    ) -> dict[str, np.ndarray]:
        """Predict from level sentences with vectors averaged over views.

        If neighbours are used (``readout.context``, and positions are known), the result is the average of a spot's own prediction
        and the mean of its neighbours' predictions.
        """
        assert self.bundle.readout is not None
        values = self.predict_levels(self.averaged_views(features), genes, chunk)
        if features.xy_N2 is None or not self.bundle.readout.settings.context:
            return values
        return {name: 0.5 * (value + neighbour_mean(value, features.xy_N2)) for name, value in values.items()}

    def averaged_views(self, features: ImageFeatures) -> ImageFeatures:
        """Return features with the shared-space vectors averaged over the readout's views.

        Raises
        ------
        ValueError
            The model has no readout, or its features were not computed.
        """
        if self.bundle.readout is None or features.readout_NF is None:
            raise ValueError(
                "readout_NF is missing, so views cannot be averaged; call image_features with readout=True on a model with a "
                "readout"
            )
        return ImageFeatures(self.view_vectors(features.readout_NF), features.pooled_Nd)

    def view_vectors(self, views_NF: np.ndarray) -> np.ndarray:
        """Return the vectors of the shared space averaged over the readout's views, at unit length, float32 (N, D).

        ``views_NF`` has features of :meth:`encode` or :meth:`image_features`; the model must have a readout.
        """
        assert self.bundle.readout is not None
        mean_ND = views_NF[:, : self.bundle.readout.settings.vector_dim]
        unit_ND = mean_ND / np.maximum(np.linalg.norm(mean_ND, axis=1, keepdims=True), 1e-12)
        return unit_ND.astype(np.float32)

    def tokens(self, genes: Sequence[GeneQuery]) -> tuple[GeneTokens, Tensor]:
        """Return the tokens of the given genes on the device, and the index of each gene's row in the level table, int64 (G,), on the host.

        The level table has one row per trained gene, and a global row that all other genes use.
        """
        return self._tokens(genes)

    def _tokens(self, genes: Sequence[GeneQuery]) -> tuple[GeneTokens, Tensor]:
        """Return tokens on the device and row indices of the level table on the host; untrained genes have the index of the global row."""
        rows = np.array([self._row.get(g.key or "", len(self.trained_genes)) for g in genes], np.int64)
        identity = np.where(rows < len(self.trained_genes), rows + 1, 0)
        vectors = self.sentence_vectors
        vector_GK = None if vectors is None else vector_rows(vectors, [g.key or "" for g in genes])
        names = [(g.symbol, g.name) for g in genes]
        tokens = gene_tokens(self.tokenizer, names, identity, self.config.text, vector_GK)
        every = np.arange(len(genes))
        # With a copy in host memory, so that the plan of the sentences is computed without reading from the device.
        trimmed = take_genes(tokens, torch.from_numpy(every), every)
        host = {"ids": trimmed.ids_GT, "length": trimmed.length_G, "identity": trimmed.identity_G}
        if trimmed.vector_GK is not None:
            host["vector"] = trimmed.vector_GK
        sent = PackedTensors.pack(host, self.device).to(self.device)
        packed = GeneTokens(sent["ids"], sent["length"], sent["identity"], sent.get("vector"), trimmed.host)
        return packed, torch.from_numpy(rows)
