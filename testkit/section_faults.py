"""Section faults: typical errors of real data, applied to a valid section to test the section checks.

A fault takes a section and a folder for a modified image, and returns the faulty section.
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

SectionFault = Callable[[Section, Path], Section]


def _moved(change: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> SectionFault:
    """Return a fault that moves spots to ``change(xy, (width, height), um_per_px)``."""

    def corrupt(section: Section, folder: Path) -> Section:
        height, width = section.load_image().shape[:2]
        return replace(section, xy=change(section.xy.copy(), np.array([width, height]), section.meta.mpp))

    return corrupt


def _repainted(change: Callable[[Image.Image, Section], Image.Image]) -> SectionFault:
    """Return a fault that replaces the image by ``change(image, section)``."""

    def corrupt(section: Section, folder: Path) -> Section:
        path = folder / f"{section.meta.section_id}.png"
        change(Image.fromarray(section.load_image()), section).save(path, compress_level=1)
        return replace(section, image_path=path)

    return corrupt


def _recounted(change: Callable[[sparse.lil_matrix, np.ndarray], None], share: float) -> SectionFault:
    """Return a fault that calls ``change(counts, rows)`` for a random ``share`` of the spots."""

    def corrupt(section: Section, folder: Path) -> Section:
        counts, n = section.counts.tolil(), len(section.spot_ids)
        change(counts, np.random.default_rng(1).permutation(n)[: max(2, int(share * n) // 2 * 2)])
        return replace(section, counts=sparse.csr_matrix(counts.tocsr(), dtype=np.int32))

    return corrupt


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
    """Move up to 30 % of the spots to lattice positions in the image that are far from every spot."""
    pitch = lattice_pitch(xy)
    grid = np.stack(np.meshgrid(*(np.arange(0.12 * n, 0.88 * n, pitch) for n in size)), -1).reshape(-1, 2)
    free = grid[cKDTree(xy).query(grid)[0] > 3 * pitch]
    rng = np.random.default_rng(1)
    n = min(len(free), int(0.3 * len(xy)))
    xy[rng.permutation(len(xy))[:n]] = free[rng.permutation(len(free))[:n]]
    return xy


def _cut_out(image: Image.Image, section: Section) -> Image.Image:
    """Keep a square of 90 % of the spot diameter around each spot and fill the rest with white."""
    pixels = np.asarray(image)
    out = np.full_like(pixels, 250)
    radius = 0.45 * section.meta.spot_diameter_um / section.meta.mpp
    for x, y in section.xy:
        x0, x1 = (int(np.clip(v, 0, pixels.shape[1])) for v in (x - radius, x + radius + 1))
        y0, y1 = (int(np.clip(v, 0, pixels.shape[0])) for v in (y - radius, y + radius + 1))
        out[y0:y1, x0:x1] = pixels[y0:y1, x0:x1]
    return Image.fromarray(out)


def _fluorescent(image: Image.Image, section: Section) -> Image.Image:
    """Return an image of blue nuclei on a black background."""
    dark = 255 - np.asarray(image.convert("L")).astype(np.float32)
    out = np.zeros((*dark.shape, 3), np.uint8)
    out[..., 2] = np.clip(1.3 * (dark - 30), 0, 255)
    return Image.fromarray(out)


def _blurred(um: float) -> SectionFault:
    return _repainted(lambda image, section: image.filter(ImageFilter.GaussianBlur(um / section.meta.mpp)))


def _scaled_mpp(factor: float) -> SectionFault:
    return lambda section, folder: replace(section, meta=replace(section.meta, mpp=section.meta.mpp * factor))


def _unknown_genes(section: Section, folder: Path) -> Section:
    ids = [f"clone_{i}" if i % 5 == 0 else g for i, g in enumerate(section.gene_ids)]
    symbols = ["" if i % 5 == 0 else s for i, s in enumerate(section.gene_symbols)]
    return replace(section, gene_ids=ids, gene_symbols=symbols)


def _half_joined(section: Section, folder: Path) -> Section:
    lost = {"in the counts but without a position": len(section.spot_ids) // 3}
    return replace(section, dropped=section.dropped | lost)


BLURS_UM = {"blurred by 4 um": 4.0, "blurred by 10 um": 10.0}
"""Standard deviation of each blur; one narrower than half a px of the image changes nothing that could be found."""
SECTION_FAULTS: dict[str, tuple[str, SectionFault]] = {
    "x and y swapped": ("orientation", _moved(lambda xy, size, mpp: xy[:, ::-1])),
    "mirrored across the image": ("orientation", _moved(_mirrored)),
    "mirrored within the bounding box of the spots": ("orientation", _moved(_flipped_in_box)),
    "corners of 224 um tiles as centres": ("corner", _moved(lambda xy, size, mpp: xy - 112 / mpp)),
    "corners of 112 um tiles as centres": ("corner", _moved(lambda xy, size, mpp: xy - 56 / mpp)),
    "positions in px of an image half the size": ("full_or_hires", _moved(lambda xy, size, mpp: xy * 0.5)),
    "positions in px of the hires image (0.17)": ("full_or_hires", _moved(lambda xy, size, mpp: xy * 0.17)),
    "um per px 1.5 times too large": ("scale", _scaled_mpp(1.5)),
    "um per px half the true value": ("scale", _scaled_mpp(0.5)),
    "30 % of the spots on background": ("on_tissue", _moved(_strayed)),
    "tissue cut out, background white": ("background", _repainted(_cut_out)),
    "blurred by 4 um": ("blur", _blurred(BLURS_UM["blurred by 4 um"])),
    "blurred by 10 um": ("blur", _blurred(BLURS_UM["blurred by 10 um"])),
    "grey-scale image": ("stain", _repainted(lambda image, section: image.convert("L").convert("RGB"))),
    "fluorescence image": ("stain", _repainted(_fluorescent)),
    "20 % of the spots empty": ("empty_spots", _recounted(_zero, 0.2)),
    "5 % of the spots duplicated": ("repeated_spots", _recounted(_copy, 0.1)),
    "20 % of the genes unknown": ("genes", _unknown_genes),
    "25 % of the spots not joined": ("join", _half_joined),
}
"""{fault: (the check that must detect it, the function that applies it)}."""
