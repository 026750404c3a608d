"""Prediction of expression from tiles with a trained model.

For an image vector z and gene g, the prediction is the expected value over expression levels q:

    p(q | z, g) = softmax_q( scale * <z, h(g, q)> + log_prior[g, q] )        x[g] = sum_q p(q | z, g) value[g, q]

h(g, q) is the sentence vector and log_prior the log frequency of the gene's levels, as in training. Genes that were not
trained are predicted in the same way, with the frequencies and values of the global row of the level table.
"""

from __future__ import annotations

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
from comtip_fast.genes.tokens import GeneTokens, gene_tokens, take_genes
from comtip_fast.models import CoMTIP


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


class Predictor:
    """A trained model that predicts expression from tiles.

    Parameters
    ----------
    bundle
        Contents of an export.
    device
        Device of the model.

    Raises
    ------
    ValueError
        The model was trained with another tokenizer.
    """

    def __init__(self, bundle: Bundle, device: str | torch.device = "cpu") -> None:
        self.bundle, self.device = bundle, torch.device(device)
        self.config, self.model = bundle.config, bundle.model.to(self.device).eval()
        self.tokenizer = GeneTokenizer.load()
        if self.tokenizer.sha256 != bundle.tokenizer_sha256:
            raise ValueError(
                "the model was trained with another tokenizer; install the comtip-fast version that wrote the export"
            )
        self.trained_genes = [g.key for g in bundle.genes if g.trained]
        self.held_out_genes = [g.key for g in bundle.genes if g.held_out]
        self.train_sections = bundle.sections
        self.tile_px, self.tile_um, self.min_mpp = bundle.sizes.tile_px, bundle.tile_um, bundle.min_mpp
        self._row = {key: i for i, key in enumerate(self.trained_genes)}

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Predictor:
        """Load from a run folder (its ``export/``) or from an export folder."""
        folder = Path(path)
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist; give the folder of a finished run or an export")
        return cls(Bundle.load(folder / "export" if (folder / "export").is_dir() else folder), device)

    @torch.no_grad()
    def image_features(self, tiles_NCHW: np.ndarray, stain: StainStats | None) -> ImageFeatures:
        """Encode uint8 tiles (N, 3, S, S); ``stain`` holds the stain statistics of their section."""
        vectors, pooled = [], []
        for start in range(0, len(tiles_NCHW), 128):
            tiles = np.asarray(tiles_NCHW[start : start + 128]).transpose(0, 2, 3, 1)
            if self.config.data.stain == "section" and stain is not None:
                tiles = normalise_stain(tiles, stain)
            x = torch.from_numpy(np.ascontiguousarray(tiles.transpose(0, 3, 1, 2))).to(self.device)
            out = self.model.encode_image(self.model.vision.stem_features(x))
            vectors.append(out.vector_BD.float().cpu().numpy())
            pooled.append(out.pooled_Bd.float().cpu().numpy())
        if not vectors:
            empty = np.zeros((0, self.config.align.dim), np.float32)
            return ImageFeatures(empty, np.zeros((0, self.model.vision.width), np.float32))
        return ImageFeatures(np.concatenate(vectors), np.concatenate(pooled))

    def predict(self, features: ImageFeatures, genes: Sequence[GeneQuery], chunk: int = 256) -> dict[str, np.ndarray]:
        """Predict expression, ``chunk`` genes at a time; see :func:`predict_trained` for the result."""
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

    def _tokens(self, genes: Sequence[GeneQuery]) -> tuple[GeneTokens, Tensor]:
        rows = np.array([self._row.get(g.key or "", len(self.trained_genes)) for g in genes], np.int64)
        identity = np.where(rows < len(self.trained_genes), rows + 1, 0)
        tokens = gene_tokens(self.tokenizer, [(g.symbol, g.name) for g in genes], identity, self.config.text)
        trimmed = take_genes(tokens, torch.arange(len(genes)))
        return trimmed.to(self.device), torch.from_numpy(rows).to(self.device)
