"""From trained weights to numbers: the export on disk, and prediction of expression from a tile alone.

For gene g, an image's similarities to h(g, q) over all levels q go through a softmax (on top of the log
frequency of the gene's levels, as in training) and weight the levels' values; the sum is the prediction:

    p(q | z, g) = softmax_q( scale * <z, h(g, q)> + log_prior[g, q] )        x[g] = sum_q p(q | z, g) value[g, q]

A gene that training never saw goes the same way: it has a name, so it has sentences; its levels' frequencies
and values are those of the global row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comtip_shards.tiles import StainStats, normalise_stain
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from comtip_fast._version import __version__
from comtip_fast.config.io import config_from_dict, config_to_dict
from comtip_fast.config.schema import RunConfig
from comtip_fast.data.gene_tokens import gene_tokens, take_genes
from comtip_fast.data.levels import LevelTable
from comtip_fast.genes import GeneTokenizer
from comtip_fast.models import CoMTIP, GeneTokens, ModelSizes

EXPORT_FORMAT, EXPORT_VERSION = "comtip-export", 1


@dataclass(frozen=True)
class GeneQuery:
    """A gene to predict: its symbol, its full name (may be empty), and its key where it has one."""

    symbol: str
    name: str = ""
    key: str | None = None


@dataclass
class ImageFeatures:
    """Tiles in the shared space and in the image encoder's own."""

    vector_ND: np.ndarray
    """float32 unit vectors."""
    pooled_Nd: np.ndarray
    """float32, mean patch feature before projection."""


@dataclass(frozen=True)
class ExportGene:
    """One gene the model knows of."""

    key: str
    symbol: str
    ensembl: str
    name: str
    trained: bool
    held_out: bool


def expected_values(
    image_ND: Tensor, unit_GQD: Tensor, scale: Tensor, log_prior_GQ: Tensor, values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the expectation of each value table under p(q | z, g); see the module's formula. (N, G) each."""
    scores_NGQ = scale * torch.einsum("nd,gqd->ngq", image_ND, unit_GQD) + log_prior_GQ
    p_NGQ = scores_NGQ.softmax(dim=-1)
    return {name: (p_NGQ * value_GQ).sum(-1) for name, value_GQ in values.items()}


@torch.no_grad()
def predict_trained(
    model: CoMTIP, genes: GeneTokens, image_ND: Tensor, levels: LevelTable, rows: Tensor
) -> dict[str, np.ndarray]:
    """Predict genes whose level rows are ``rows``; float32 (N, G) log1p CP10K and log1p raw counts."""
    unit_GQD = model.sentence_table(genes).unit_GQD
    pick = rows.cpu().numpy()
    values = {"cp10k": levels.value_cp10k[pick], "raw": levels.value_raw[pick]}
    device = image_ND.device
    tables = {k: torch.from_numpy(v).to(device) for k, v in values.items()}
    prior = torch.from_numpy(levels.log_prior[pick]).to(device)
    scale = model.log_scale_level.clamp(max=model.max_log_scale).exp()
    out = expected_values(image_ND, unit_GQD, scale, prior, tables)
    return {k: v.float().cpu().numpy() for k, v in out.items()}


def mean_pcc(measured_NG: np.ndarray, predicted_NG: np.ndarray) -> float:
    """Return the mean Pearson correlation over genes; a gene without variance on either side counts 0."""
    a, b = measured_NG - measured_NG.mean(0), predicted_NG - predicted_NG.mean(0)
    norm = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return float(np.where(norm > 1e-12, (a * b).sum(0) / np.maximum(norm, 1e-12), 0.0).mean())


@dataclass
class Bundle:
    """Everything that evaluation and prediction need; ``save`` and ``load`` never pickle."""

    config: RunConfig
    sizes: ModelSizes
    model: CoMTIP
    levels: LevelTable
    genes: list[ExportGene]
    sections: list[dict[str, Any]]
    tile_um: float
    min_mpp: float
    tokenizer_sha256: str

    @classmethod
    def from_training(
        cls,
        config: RunConfig,
        sizes: ModelSizes,
        model: CoMTIP,
        shards: Any,
        tables: Any,
        tokenizer: GeneTokenizer,
    ) -> Bundle:
        """Collect what training knows; trained genes come first, in the order of the level table's rows."""
        chosen = [(r, True) for r in tables.genes.trained] + [(r, False) for r in tables.genes.held_out]
        genes = []
        for row, trained in chosen:
            g = shards.genes[row]
            genes.append(ExportGene(g.key, g.symbol, g.ensembl, g.name, trained, not trained))
        sections = [
            {k: getattr(s, k) for k in ("section_id", "dataset", "species", "tissue", "donor", "licence", "attribution", "split")}
            | {"n_spots": s.n_spots}
            for s in shards.manifest.sections
        ]  # fmt: skip
        tile = shards.manifest.tile
        return cls(config, sizes, model, tables.table, genes, sections, tile.um, tile.min_mpp, tokenizer.sha256)

    def save(self, folder: Path) -> None:
        """Write ``config.json``, ``model.safetensors``, ``levels.safetensors``, ``genes.tsv``, ``README.md``."""
        folder.mkdir(parents=True, exist_ok=True)
        meta = {
            "format": EXPORT_FORMAT, "version": EXPORT_VERSION, "comtip_fast": __version__,
            "config": config_to_dict(self.config), "sizes": asdict(self.sizes), "tile_um": self.tile_um,
            "min_mpp": self.min_mpp,
            "tokenizer_sha256": self.tokenizer_sha256, "sections": self.sections,
        }  # fmt: skip
        state = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        save_arrays(self.levels.to_arrays(), folder / "levels.safetensors")
        with (folder / "genes.tsv").open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file, delimiter="\t", lineterminator="\n")
            out.writerow(["key", "symbol", "ensembl", "name", "trained", "held_out"])
            for g in self.genes:
                out.writerow([g.key, g.symbol, g.ensembl, g.name, int(g.trained), int(g.held_out)])
        (folder / "README.md").write_text(model_card(self), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Bundle:
        """Read an export; another format version is refused by name."""
        meta = _read_meta(folder)
        config, sizes = (
            config_from_dict(meta["config"], str(folder / "config.json")),
            ModelSizes(**meta["sizes"]),
        )
        model = CoMTIP(config, sizes)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        with (folder / "genes.tsv").open(newline="", encoding="utf-8") as file:
            genes = [
                ExportGene(r["key"], r["symbol"], r["ensembl"], r["name"], r["trained"] == "1", r["held_out"] == "1")
                for r in csv.DictReader(file, delimiter="\t")
            ]
        levels = LevelTable(**load_arrays(folder / "levels.safetensors"))
        return cls(
            config, sizes, model.to(device).eval(), levels, genes, meta["sections"], meta["tile_um"],
            meta["min_mpp"], meta["tokenizer_sha256"],
        )  # fmt: skip


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no export (config.json is missing); give a finished run or its export")
    meta = json.loads(path.read_text(encoding="utf-8"))
    if meta.get("format") != EXPORT_FORMAT or meta.get("version") != EXPORT_VERSION:
        raise ValueError(
            f"{path}: format {meta.get('format')!r} version {meta.get('version')!r}; this comtip-fast "
            f"({__version__}) reads {EXPORT_FORMAT!r} version {EXPORT_VERSION}"
        )
    return dict(meta)


class Predictor:
    """A trained model that says what is expressed under a tile."""

    def __init__(self, bundle: Bundle, device: str | torch.device = "cpu") -> None:
        self.bundle, self.device = bundle, torch.device(device)
        self.config, self.model = bundle.config, bundle.model.to(self.device).eval()
        self.tokenizer = GeneTokenizer.load()
        if self.tokenizer.sha256 != bundle.tokenizer_sha256:
            raise ValueError("this model was trained with another tokenizer file; install the comtip-fast it came from")
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
            raise FileNotFoundError(f"{folder} does not exist; give a run folder or an export")
        return cls(Bundle.load(folder / "export" if (folder / "export").is_dir() else folder), device)

    @torch.no_grad()
    def image_features(self, tiles_NCHW: np.ndarray, stain: StainStats | None) -> ImageFeatures:
        """Encode uint8 tiles (N, 3, S, S); ``stain`` are their section's statistics."""
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
        """Predict expression: ``cp10k`` (log1p CP10K) and ``raw`` (log1p counts), float32 (N, G) each."""
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
        whole = take_genes(tokens, torch.arange(len(genes)))
        return whole.to(self.device), torch.from_numpy(rows).to(self.device)


def model_card(bundle: Bundle) -> str:
    """Return the export's README: what it was trained on, under which licences, and what it must not be used for."""
    rows = "\n".join(
        f"| {s['section_id']} | {s['split'] or '-'} | {s['species']} | {s['tissue']} | {s['donor']} | {s['n_spots']} | {s['licence']} |"
        for s in bundle.sections
    )
    credits = "\n".join(f"- {a}" for a in sorted({s["attribution"] for s in bundle.sections if s["attribution"]}))
    trained, held = sum(g.trained for g in bundle.genes), sum(g.held_out for g in bundle.genes)
    return (
        f"# {bundle.config.name}: a CoMTIP model\n\n"
        f"Made by comtip-fast {__version__}. Tiles of {bundle.tile_um:g} um in {bundle.sizes.tile_px} px; "
        f"{trained} genes trained, {held} held out by name.\n\n"
        "Only sections whose split is `train` moved the weights; `val` chose when to stop; `test` was not read.\n\n"
        "| section | split | species | tissue | donor | spots | licence |\n|---|---|---|---|---|---|---|\n"
        f"{rows}\n\n## Attribution\n{credits}\n\n## Use\nResearch only; not a medical device. "
        "`comtip_fast.load(<this folder>)`; weights are safetensors and nothing is unpickled.\n"
    )
