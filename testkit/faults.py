"""Spoil a sound section in the ways that real ones are spoiled, to prove that the checks find it.

Each fault takes a section and a folder to write a changed picture into, and returns another section.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from comtip_shards.qc.context import lattice_pitch
from comtip_shards.sections.section import Section
from PIL import Image, ImageFilter
from scipy import sparse
from scipy.spatial import cKDTree

Spoil = Callable[[Section, Path], Section]


def _moved(change: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> Spoil:
    """Return a fault of positions: ``change(xy, (width, height), um per px)``."""

    def spoil(section: Section, folder: Path) -> Section:
        height, width = section.load_image().shape[:2]
        return replace(section, xy=change(section.xy.copy(), np.array([width, height]), section.meta.mpp))

    return spoil


def _repainted(change: Callable[[Image.Image, Section], Image.Image]) -> Spoil:
    """Return a fault of the picture."""

    def spoil(section: Section, folder: Path) -> Section:
        path = folder / f"{section.meta.section_id}.png"
        change(Image.fromarray(section.load_image()), section).save(path, compress_level=1)
        return replace(section, image_path=path)

    return spoil


def _recounted(change: Callable[[sparse.lil_matrix, np.ndarray], None], share: float) -> Spoil:
    """Return a fault of the counts of a share of the spots."""

    def spoil(section: Section, folder: Path) -> Section:
        counts, n = section.counts.tolil(), len(section.spot_ids)
        change(counts, np.random.default_rng(1).permutation(n)[: max(2, int(share * n) // 2 * 2)])
        return replace(section, counts=sparse.csr_matrix(counts.tocsr(), dtype=np.int32))

    return spoil


def _zero(counts: sparse.lil_matrix, rows: np.ndarray) -> None:
    counts[rows] = 0


def _copy(counts: sparse.lil_matrix, rows: np.ndarray) -> None:
    half = len(rows) // 2
    counts[rows[:half]] = counts[rows[half:]]


def _mirrored(xy: np.ndarray, size: np.ndarray, mpp: float) -> np.ndarray:
    return np.column_stack([size[0] - xy[:, 0], xy[:, 1]])


def _flipped_in_box(xy: np.ndarray, size: np.ndarray, mpp: float) -> np.ndarray:
    return np.column_stack([xy[:, 0], xy[:, 1].min() + xy[:, 1].max() - xy[:, 1]])


def _strayed(xy: np.ndarray, size: np.ndarray, mpp: float) -> np.ndarray:
    """Move three in ten spots to where the frame is far from any spot, on a lattice as spots are."""
    pitch = lattice_pitch(xy)
    grid = np.stack(np.meshgrid(*(np.arange(0.12 * n, 0.88 * n, pitch) for n in size)), -1).reshape(-1, 2)
    free = grid[cKDTree(xy).query(grid)[0] > 3 * pitch]
    rng = np.random.default_rng(1)
    n = min(len(free), int(0.3 * len(xy)))
    xy[rng.permutation(len(xy))[:n]] = free[rng.permutation(len(free))[:n]]
    return xy


def _cut_out(image: Image.Image, section: Section) -> Image.Image:
    """Leave a square of nine tenths of a spot under each spot, and white around."""
    pixels = np.asarray(image)
    out = np.full_like(pixels, 250)
    radius = 0.45 * section.meta.spot_diameter_um / section.meta.mpp
    for x, y in section.xy:
        x0, x1 = (int(np.clip(v, 0, pixels.shape[1])) for v in (x - radius, x + radius + 1))
        y0, y1 = (int(np.clip(v, 0, pixels.shape[0])) for v in (y - radius, y + radius + 1))
        out[y0:y1, x0:x1] = pixels[y0:y1, x0:x1]
    return Image.fromarray(out)


def _fluorescent(image: Image.Image, section: Section) -> Image.Image:
    """Nuclei light up blue on black."""
    dark = 255 - np.asarray(image.convert("L")).astype(np.float32)
    out = np.zeros((*dark.shape, 3), np.uint8)
    out[..., 2] = np.clip(1.3 * (dark - 30), 0, 255)
    return Image.fromarray(out)


def _blurred(um: float) -> Spoil:
    return _repainted(lambda image, section: image.filter(ImageFilter.GaussianBlur(um / section.meta.mpp)))


def _scaled_mpp(factor: float) -> Spoil:
    return lambda section, folder: replace(section, meta=replace(section.meta, mpp=section.meta.mpp * factor))


def _unknown_genes(section: Section, folder: Path) -> Section:
    ids = [f"clone_{i}" if i % 5 == 0 else g for i, g in enumerate(section.gene_ids)]
    symbols = ["" if i % 5 == 0 else s for i, s in enumerate(section.gene_symbols)]
    return replace(section, gene_ids=ids, gene_symbols=symbols)


def _half_joined(section: Section, folder: Path) -> Section:
    lost = {"in the counts but without a position": len(section.spot_ids) // 3}
    return replace(section, dropped=section.dropped | lost)


FAULTS: dict[str, tuple[str, Spoil]] = {
    "x and y swapped": ("orientation", _moved(lambda xy, size, mpp: xy[:, ::-1])),
    "mirrored in the picture": ("orientation", _moved(_mirrored)),
    "mirrored within the spots' box": ("orientation", _moved(_flipped_in_box)),
    "corners of 224 um tiles": ("corner", _moved(lambda xy, size, mpp: xy - 112 / mpp)),
    "corners of 112 um tiles": ("corner", _moved(lambda xy, size, mpp: xy - 56 / mpp)),
    "positions of a picture half the size": ("full_or_hires", _moved(lambda xy, size, mpp: xy * 0.5)),
    "positions of a hires picture (0.17)": ("full_or_hires", _moved(lambda xy, size, mpp: xy * 0.17)),
    "um per px 1.5 times too large": ("scale", _scaled_mpp(1.5)),
    "um per px half of what it is": ("scale", _scaled_mpp(0.5)),
    "a third of the spots on glass": ("on_tissue", _moved(_strayed)),
    "tissue cut out of its surroundings": ("background", _repainted(_cut_out)),
    "blurred by 4 um": ("blur", _blurred(4)),
    "blurred by 10 um": ("blur", _blurred(10)),
    "gray picture": ("stain", _repainted(lambda image, section: image.convert("L").convert("RGB"))),
    "fluorescence": ("stain", _repainted(_fluorescent)),
    "a fifth of the spots empty": ("empty_spots", _recounted(_zero, 0.2)),
    "one spot in twenty repeated": ("repeated_spots", _recounted(_copy, 0.1)),
    "a fifth of the genes unknown": ("genes", _unknown_genes),
    "a quarter of the spots not joined": ("join", _half_joined),
}
"""{fault: (the check that must find it, how to make it)}."""
