"""Prediction of expression from tiles with a trained model.

For an image vector z and gene g, the prediction is the expected value over expression levels q:

    p(q | z, g) = softmax_q( scale * <z, h(g, q)> + log_prior[g, q] )        x[g] = sum_q p(q | z, g) value[g, q]

h(g, q) is the sentence vector and log_prior the log frequency of the gene's levels, as in training. Genes that were not
trained are predicted in the same way, with the frequencies and values of the global row of the level table.

If the export has a linear readout (:mod:`comtip_fast.models.readout`), the prediction of a trained gene is a mixture of this
expected value and of the readout. With gene vectors, the readout also predicts genes that were not trained.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from comtip_shards.slides.tiles import StainStats, normalise_stain
from torch import Tensor

from comtip_fast.data.expression.levels import LevelTable
from comtip_fast.export import Bundle
from comtip_fast.genes import GeneTokenizer
from comtip_fast.genes.tokens import GeneTokens, gene_tokens, take_genes, vector_rows
from comtip_fast.genes.vectors import GeneVectors
from comtip_fast.lineage import symbol_of
from comtip_fast.models import CoMTIP
from comtip_fast.models.readout import neighbour_mean, tile_features

log = logging.getLogger("comtip_fast")


@dataclass(frozen=True)
class GeneQuery:
    """A gene to predict: symbol, full name (may be empty), and key (None if unresolved)."""

    symbol: str
    name: str = ""
    key: str | None = None


@dataclass
class ImageFeatures:
    """Features of N tiles."""

    vector_ND: np.ndarray
    """float32 (N, D), unit vectors of the shared space."""
    pooled_Nd: np.ndarray
    """float32 (N, d), mean patch feature before projection."""
    readout_NF: np.ndarray | None = None
    """float32 (N, F), input of the linear readout; None if the model has none."""
    xy_N2: np.ndarray | None = None
    """Positions of the spots, if known."""


def expected_values(
    image_ND: Tensor, unit_GQD: Tensor, scale: Tensor, log_prior_GQ: Tensor, values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the expectation of each value table under p(q | z, g), as in the module docstring.

    Parameters
    ----------
    image_ND
        Image vectors.
    unit_GQD
        Unit sentence vectors.
    scale
        Inverse temperature, a scalar.
    log_prior_GQ
        Log frequency of each level.
    values
        Tables (G, Q) of level values, by name.

    Returns
    -------
    dict
        Expectations (N, G), by the names of ``values``.
    """
    scores_NGQ = scale * torch.einsum("nd,gqd->ngq", image_ND, unit_GQD) + log_prior_GQ
    p_NGQ = scores_NGQ.softmax(dim=-1)
    return {name: (p_NGQ * value_GQ).sum(-1) for name, value_GQ in values.items()}


@torch.no_grad()
def predict_trained(
    model: CoMTIP, genes: GeneTokens, image_ND: Tensor, levels: LevelTable, rows: Tensor
) -> dict[str, np.ndarray]:
    """Predict expression of G genes.

    Parameters
    ----------
    model, genes, image_ND, levels
        Model, gene tokens, image vectors and level table.
    rows
        int64 (G,), row of each gene in the level table.

    Returns
    -------
    dict
        ``cp10k`` (log1p of counts per 10,000) and ``raw`` (log1p of counts), float32 (N, G).
    """
    unit_GQD = model.sentence_table(genes).unit_GQD
    pick = rows.cpu().numpy()
    values = {"cp10k": levels.value_cp10k[pick], "raw": levels.value_raw[pick]}
    device = image_ND.device
    tables = {k: torch.from_numpy(v).to(device) for k, v in values.items()}
    prior = torch.from_numpy(levels.log_prior[pick]).to(device)
    scale = model.log_scale_level.clamp(max=model.max_log_scale).exp()
    out = expected_values(image_ND, unit_GQD, scale, prior, tables)
    return {k: v.float().cpu().numpy() for k, v in out.items()}


def _vectors_of(bundle: Bundle, given: GeneVectors | None) -> tuple[GeneVectors | None, GeneVectors | None]:
    """Return the vectors that the gene encoder reads, and those that the linear readout decodes unseen genes with."""
    own = bundle.vectors
    further = None if own is None or given is None else own.extended_by(given)
    if given is not None and further is None and bundle.readout is None:
        raise ValueError(
            "gene vectors were given, but the model has no linear readout to use them with; train with "
            "readout.kind=linear, or omit --gene-vectors"
            if own is None
            else "the gene vectors have other axes than those that the model was trained with, and it has no linear readout to "
            "use them with; give vectors that agree with the export's on the genes of both"
        )
    if own is not None and given is not None and further is None:
        log.warning(
            "the gene vectors have other axes than those that the model was trained with: the linear readout uses them, "
            "gene sentences do not"
        )
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
        Gene vectors, with which genes that were not trained are predicted. For a model that was trained with gene vectors,
        which its export holds, they add genes.

    Raises
    ------
    ValueError
        Gene vectors were given, but the model can't use them. Or the model was trained with another tokenizer.
    """

    def __init__(self, bundle: Bundle, device: str | torch.device = "cpu", vectors: GeneVectors | None = None) -> None:
        self.bundle, self.device = bundle, torch.device(device)
        self.sentence_vectors, self.vectors = _vectors_of(bundle, vectors)
        self.config, self.model = bundle.config, bundle.model.to(self.device).eval()
        self.tokenizer = GeneTokenizer.load()
        if self.tokenizer.sha256 != bundle.tokenizer_sha256:
            raise ValueError(
                "the model was trained with another tokenizer; install the comtip-fast version that wrote the export"
            )
        self.trained_genes = [g.key for g in bundle.genes if g.trained]
        self.lineage = bundle.lineage
        self._by_parents = self.lineage.genes_of_ancestors()
        # A gene that a parent trained is not unseen, even if this run held it out.
        self.held_out_genes = [g.key for g in bundle.genes if g.held_out and symbol_of(g.key) not in self._by_parents]
        self._held_out = frozenset(self.held_out_genes)
        self.train_sections = bundle.sections
        self.tile_px, self.tile_um, self.min_mpp = bundle.sizes.tile_px, bundle.tile_um, bundle.min_mpp
        self._row = {key: i for i, key in enumerate(self.trained_genes)}

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu", vectors: str | Path | None = None) -> Predictor:
        """Load from a run folder (its ``export/``) or from an export folder; ``vectors`` is a file of gene vectors."""
        folder = Path(path)
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist; give the folder of a finished run or an export")
        bundle = Bundle.load(folder / "export" if (folder / "export").is_dir() else folder)
        return cls(bundle, device, None if vectors is None else GeneVectors.load(vectors))

    def training_of(self, key: str) -> str:
        """Return ``trained``, ``trained by a parent``, ``held out`` or ``never seen``, over all runs of the lineage."""
        if key in self._row:
            return "trained"
        if symbol_of(key) in self._by_parents:
            return "trained by a parent"
        return "held out" if key in self._held_out else "never seen"

    def has_vector(self, key: str) -> bool:
        """Return whether there is a gene vector for the gene."""
        return any(v is not None and key in v.row for v in (self.vectors, self.sentence_vectors))

    @torch.no_grad()
    def image_features(
        self,
        tiles_NCHW: np.ndarray,
        stain: StainStats | None,
        xy_N2: np.ndarray | None = None,
        *,
        readout: bool = True,
    ) -> ImageFeatures:
        """Encode the tiles of one section.

        Parameters
        ----------
        tiles_NCHW
            uint8 tiles (N, 3, S, S).
        stain
            Stain statistics of the section.
        xy_N2
            Positions of the spots in any unit, which define the neighbours in the linear readout; None uses each spot alone.
        readout
            Whether to compute the readout's features, which encodes each tile under ``readout.views`` views.
        """
        linear = self.bundle.readout if readout else None
        vectors, pooled, features = [], [], []
        for start in range(0, len(tiles_NCHW), 128):
            tiles = np.asarray(tiles_NCHW[start : start + 128]).transpose(0, 2, 3, 1)
            if self.config.data.stain == "section" and stain is not None:
                tiles = normalise_stain(tiles, stain)
            x = torch.from_numpy(np.ascontiguousarray(tiles.transpose(0, 3, 1, 2))).to(self.device)
            if linear is None:
                out = self.model.encode_image(self.model.vision.stem_features(x))
            else:
                out, part = tile_features(self.model, x, linear.settings.views)
                features.append(part)
            vectors.append(out.vector_BD.float().cpu().numpy())
            pooled.append(out.pooled_Bd.float().cpu().numpy())
        if not vectors:
            empty = np.zeros((0, self.config.align.dim), np.float32)
            return ImageFeatures(empty, np.zeros((0, self.model.vision.width), np.float32))
        joined = None if linear is None else linear.head_features(np.concatenate(features), xy_N2)
        return ImageFeatures(np.concatenate(vectors), np.concatenate(pooled), joined, xy_N2)

    def predict(
        self, features: ImageFeatures, genes: Sequence[GeneQuery], chunk: int = 256, cohort: str | None = None
    ) -> dict[str, np.ndarray]:
        """Predict expression of one section.

        Trained genes are predicted by the linear readout, mixed with the prediction from level sentences. Genes that were
        not trained are predicted with gene vectors if those hold the gene. All others, and all genes of a model without a
        readout, are predicted from level sentences alone.

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
        self, features: ImageFeatures, genes: Sequence[GeneQuery], chunk: int = 256
    ) -> dict[str, np.ndarray]:
        """Predict expression from level sentences alone, ``chunk`` genes at a time; see :func:`predict_trained`."""
        image = torch.from_numpy(features.vector_ND).to(self.device)
        parts: list[dict[str, np.ndarray]] = []
        for start in range(0, len(genes), chunk):
            tokens, rows = self._tokens(genes[start : start + chunk])
            parts.append(predict_trained(self.model, tokens, image, self.bundle.levels, rows))
        n = len(features.vector_ND)
        return {
            k: np.concatenate([p[k] for p in parts], axis=1) if parts else np.zeros((n, 0), np.float32)
            for k in ("cp10k", "raw")
        }

    def _smoothed_levels(
        self, features: ImageFeatures, genes: Sequence[GeneQuery], chunk: int
    ) -> dict[str, np.ndarray]:
        """Predict from level sentences with vectors averaged over views, and average half and half with the neighbours."""
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
            The features were computed without a linear readout.
        """
        if self.bundle.readout is None or features.readout_NF is None:
            raise ValueError("the features have one view; compute them with a model that has a linear readout")
        mean_ND = features.readout_NF[:, : self.bundle.readout.settings.vector_dim]
        unit_ND = mean_ND / np.maximum(np.linalg.norm(mean_ND, axis=1, keepdims=True), 1e-12)
        return ImageFeatures(unit_ND.astype(np.float32), features.pooled_Nd)

    def _tokens(self, genes: Sequence[GeneQuery]) -> tuple[GeneTokens, Tensor]:
        rows = np.array([self._row.get(g.key or "", len(self.trained_genes)) for g in genes], np.int64)
        identity = np.where(rows < len(self.trained_genes), rows + 1, 0)
        vectors = self.sentence_vectors
        vector_GK = None if vectors is None else vector_rows(vectors, [g.key or "" for g in genes])
        names = [(g.symbol, g.name) for g in genes]
        tokens = gene_tokens(self.tokenizer, names, identity, self.config.text, vector_GK)
        trimmed = take_genes(tokens, torch.arange(len(genes)))
        return trimmed.to(self.device), torch.from_numpy(rows).to(self.device)
