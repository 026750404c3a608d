"""Tiny synthetic sources in which gene expression depends on the image.

Each section has a smooth random field. The image is bluer where the field is high; half of the genes increase with it, the
others decrease. Therefore only a model that learns predicts better than chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import open_source
from PIL import Image

SYMBOLS = (
    "ERBB2",
    "KRT14",
    "KRT17",
    "CD74",
    "HLA-DRA",
    "IGHG1",
    "COL1A1",
    "COL3A1",
    "ACTA2",
    "VIM",
    "EPCAM",
    "KRT8",
    "KRT18",
    "KRT19",
    "MUC1",
    "ESR1",
    "PGR",
    "MKI67",
    "TOP2A",
    "CD3E",
    "CD8A",
    "MS4A1",
    "PECAM1",
    "FN1",
    "SPARC",
    "LUM",
    "DCN",
    "B2M",
    "FTH1",
    "GAPDH",
)


@dataclass(frozen=True)
class TinySection:
    """One synthetic section."""

    section_id: str
    donor: str
    split: str


DEFAULT = (
    TinySection("t1", "donor_a", "train"),
    TinySection("t2", "donor_b", "train"),
    TinySection("v1", "donor_b", "val"),
    TinySection("x1", "donor_c", "test"),
)


def write_tiny_source(
    folder: Path,
    sections: Sequence[TinySection] = DEFAULT,
    *,
    side: int = 7,
    seed: int = 0,
    pitch_px: int = 40,
    response: Callable[[np.ndarray], np.ndarray] = lambda field: field,
) -> Path:
    """Write images, counts, spots and ``manifest.tsv`` to ``folder``, and return the path of the table.

    Parameters
    ----------
    folder
        Folder to write; it is created if it does not exist.
    sections
        Sections to write.
    side
        Number of spots in a row and in a column.
    seed
        Seed of the random fields and counts.
    pitch_px
        Distance between spots in px, which represents 200 um.
    response
        Maps the field (-1 to 1) at the spots to the level on which expression depends; the image shows the field itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, section in enumerate(sections):
        rng = np.random.default_rng([seed, number])
        size = (side + 1) * pitch_px
        field = _smooth_field(rng, size)
        _write_image(folder / f"{section.section_id}.png", field, rng)
        x, y = (a.ravel() for a in np.meshgrid(np.arange(1, side + 1), np.arange(1, side + 1)))
        ids = [f"{a}x{b}" for a, b in zip(x, y, strict=True)]
        level = response(field[y * pitch_px, x * pitch_px])
        sign = np.where(np.arange(len(SYMBOLS)) % 2 == 0, 1.0, -1.0)
        rate = np.exp(1.2 + 1.5 * level[:, None] * sign[None] + 0.1 * rng.normal(size=(1, len(SYMBOLS))))
        counts = pd.DataFrame(rng.poisson(rate), index=ids, columns=list(SYMBOLS))
        counts.to_csv(folder / f"{section.section_id}.tsv.gz", sep="\t")
        spots = {
            "spot_id": ids,
            "array_x": x,
            "array_y": y,
            "pixel_x": x * pitch_px,
            "pixel_y": y * pitch_px,
            "in_tissue": 1,
        }
        pd.DataFrame(spots).to_csv(folder / f"{section.section_id}_spots.tsv", sep="\t", index=False)
        rows.append(_manifest_row(section, pitch_px))
    table = folder / "manifest.tsv"
    pd.DataFrame(rows).to_csv(table, sep="\t", index=False)
    return table


def _manifest_row(section: TinySection, pitch_px: int) -> dict[str, object]:
    name = section.section_id
    return {
        "sample_id": name,
        "dataset": "tiny",
        "species": "human",
        "tissue": "breast, made up",
        "donor": section.donor,
        "platform": "none",
        "image": f"{name}.png",
        "counts": f"{name}.tsv.gz",
        "spots": f"{name}_spots.tsv",
        "spot_diameter_um": 100,
        "spot_pitch_um": 200,
        "mpp_um_per_px": 200 / pitch_px,
        "licence": "CC0",
        "split": section.split,
        "attribution": "made up",
    }


def _smooth_field(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a sum of four random waves scaled to [-1, 1], float64 (size, size)."""
    y, x = np.mgrid[0:size, 0:size] / size
    out = np.zeros((size, size))
    for _ in range(4):
        kx, ky, phase = rng.uniform(-6, 6), rng.uniform(-6, 6), rng.uniform(0, 2 * np.pi)
        out += np.sin(kx * x + ky * y + phase)
    return out / np.abs(out).max()


def _write_image(path: Path, field: np.ndarray, rng: np.random.Generator) -> None:
    base = np.stack([200 - 70 * field, 150 - 40 * field, 200 + 10 * field], axis=-1)
    noisy = base + rng.normal(scale=6, size=base.shape)
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path)


def tiny_shards(folder: Path) -> Path:
    """Write a tiny source, build its shard set under ``folder``, and return the path of the set."""
    source = write_tiny_source(folder / "source").parent
    build_shards(open_source(source), folder / "shards", tile_px=32, tile_um=224.0, min_mpp=5.0)
    return folder / "shards"
