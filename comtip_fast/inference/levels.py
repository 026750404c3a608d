"""Prediction from level sentences (texts of a gene and a level): the expected value over levels, in chunks of spots and genes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comtip_fast.data.expression.levels import LevelTable
from comtip_fast.data.upload import PackedTensors, upload
from comtip_fast.genes.tokens import GeneTokens
from comtip_fast.models import CoMTIP

NORMS = ("cp10k", "raw")
SCORE_BYTES = 32 << 20
"""Size of the fp32 scores (spots, genes, levels) that are computed at once."""
GENES_PER_CHUNK = 256
"""Number of genes per pass through the gene encoder."""


@dataclass(frozen=True)
class GeneQuery:
    """A gene to predict: symbol, full name (may be empty), and key (None if unresolved)."""

    symbol: str
    name: str = ""
    key: str | None = None


def expected_values(
    image_ND: Tensor, unit_GQD: Tensor, scale: Tensor, log_prior_GQ: Tensor, values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the expectation of each value table under p(q | z, g), see :mod:`comtip_fast.inference`.

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


@dataclass
class SentenceLevels:
    """Sentence vectors, level frequencies and level values of up to :data:`GENES_PER_CHUNK` genes, on the device."""

    unit_GQD: Tensor
    """fp32 unit vectors."""
    log_prior_GQ: Tensor
    values: dict[str, Tensor]
    scale: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: CoMTIP, genes: GeneTokens, levels: LevelTable, rows: Tensor) -> SentenceLevels:
        """Encode the sentences of G genes; ``rows``, int64 (G,) on the host, has the row index of each gene in the level table."""
        unit_GQD = model.sentence_table(genes).unit_GQD.float()
        pick, device = rows.numpy(), unit_GQD.device
        tables = {"prior": levels.log_prior, "cp10k": levels.value_cp10k, "raw": levels.value_raw}
        host = {name: torch.from_numpy(table[pick]) for name, table in tables.items()}
        sent = PackedTensors.pack(host, device).to(device)
        return cls(
            unit_GQD,
            sent.pop("prior"),
            sent,
            model.log_scale_level.detach().float().clamp(max=model.max_log_scale).exp(),
        )

    @torch.no_grad()
    def predict(self, image_ND: np.ndarray | Tensor) -> dict[str, np.ndarray]:
        """Predict ``cp10k`` and ``raw``, float32 (N, G), some spots at a time; in fp32 even under autocast."""
        genes, levels, _ = self.unit_GQD.shape
        out = {k: np.empty((len(image_ND), genes), np.float32) for k in NORMS}
        size = max(1, SCORE_BYTES // max(4 * genes * levels, 1))
        with torch.autocast(self.unit_GQD.device.type, enabled=False):
            for start in range(0, len(image_ND), size):
                part = upload(torch.as_tensor(image_ND[start : start + size]), self.unit_GQD.device)
                found = expected_values(part.float(), self.unit_GQD, self.scale, self.log_prior_GQ, self.values)
                joined = torch.stack([found[name] for name in NORMS]).cpu().numpy()  # one copy to the host
                for name, value in zip(NORMS, joined, strict=True):
                    out[name][start : start + size] = value
        return out


def predict_trained(
    model: CoMTIP, genes: GeneTokens, image_ND: Tensor, levels: LevelTable, rows: Tensor
) -> dict[str, np.ndarray]:
    """Predict expression of G genes.

    Parameters
    ----------
    model, genes, image_ND, levels
        Model, gene tokens, image vectors and level table.
    rows
        Row index of each gene in the level table, int64 (G,), on the host.

    Returns
    -------
    dict
        ``cp10k`` (log1p of counts per 10,000) and ``raw`` (log1p of counts), float32 (N, G).
    """
    return SentenceLevels.of(model, genes, levels, rows).predict(image_ND)


def predict_chunks(tables: Iterable[SentenceLevels], image_ND: np.ndarray) -> dict[str, np.ndarray]:
    """Predict ``cp10k`` and ``raw`` for the genes of several tables in their order, each float32 (N, G)."""
    parts = [table.predict(image_ND) for table in tables]
    empty = np.zeros((len(image_ND), 0), np.float32)
    return {k: np.concatenate([p[k] for p in parts], axis=1) if parts else empty for k in NORMS}
