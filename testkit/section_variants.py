"""Section variants: differences between scanners, laboratories and stains, applied to a valid section that remains valid.

The checks must not warn about a variant, and must find the faults of :mod:`testkit.section_faults` in it as in the original.
The exceptions are variants in another stain, which the check ``stain`` must report, and no other check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from comtip_shards.qc.run import build_context
from comtip_shards.sections.section import Section
from PIL import Image

SectionVariant = Callable[[Section, Path], Section]
DYES_33 = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical density of haematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston 2001)."""
COVERED = 0.97
"""Minimum share of tissue in a crop that counts as filled with tissue."""


def repainted(change: Callable[[np.ndarray], np.ndarray]) -> SectionVariant:
    """Return a variant whose image is ``change(pixels)``; pixels are float (H, W, 3) from 0 to 255."""

    def apply(section: Section, folder: Path) -> Section:
        pixels = np.clip(np.rint(change(section.load_image().astype(np.float32))), 0, 255).astype(np.uint8)
        return _with_image(section, pixels, folder)

    return apply


def _with_image(section: Section, pixels_HW3: np.ndarray, folder: Path) -> Section:
    path = folder / f"{section.meta.section_id}_variant.png"
    Image.fromarray(pixels_HW3).save(path, compress_level=1)
    return replace(section, image_path=path)


def _glass(pixels_HW3: np.ndarray) -> np.ndarray:
    """Return the colour of glass, taken as the 95th percentile of each channel, float (3,)."""
    return np.percentile(pixels_HW3[::4, ::4].reshape(-1, 3), 95, axis=0)


def stained(factor: float) -> SectionVariant:
    """Return a variant with the optical density of all stains multiplied by ``factor``."""

    def change(pixels: np.ndarray) -> np.ndarray:
        glass = _glass(pixels)
        return glass * ((pixels + 1) / (glass + 1)) ** factor

    return repainted(change)


def lit(lamp: Callable[[tuple[int, int]], np.ndarray | float]) -> SectionVariant:
    """Return a variant with other illumination: pixels are multiplied by ``lamp((height, width))``."""
    return repainted(lambda pixels: pixels * lamp(pixels.shape[:2]))


def scanned_at(factor: float) -> SectionVariant:
    """Return a variant with ``factor`` times the um per px."""

    def apply(section: Section, folder: Path) -> Section:
        image = Image.fromarray(section.load_image())
        size = (round(image.width / factor), round(image.height / factor))
        out = _with_image(section, np.asarray(image.resize(size, Image.Resampling.BOX)), folder)
        xy = section.xy * (np.array(size) / image.size)
        return replace(out, xy=xy, meta=replace(section.meta, mpp=section.meta.mpp * image.width / size[0]))

    return apply


def filled(then: SectionVariant | None = None) -> SectionVariant:
    """Return a variant cropped to the largest rectangle of tissue and its spots, to which ``then`` is applied."""

    def apply(section: Section, folder: Path) -> Section:
        with section.open_slide() as slide:
            context = build_context(section, slide, 224.0)
        cell = context.picture_HW3.shape[0] / context.tissue.shape[0] / context.scale
        x0, y0, x1, y1 = (round(v * cell) for v in _largest_rectangle(context.tissue))
        inside = ((section.xy >= [x0, y0]) & (section.xy < [x1, y1])).all(1)
        out = _with_image(section, section.load_image()[y0:y1, x0:x1], folder)
        rows = np.flatnonzero(inside)
        out = replace(
            out,
            xy=section.xy[rows] - [x0, y0],
            array_xy=section.array_xy[rows],
            counts=section.counts[rows],
            spot_ids=[section.spot_ids[i] for i in rows],
            labels=[section.labels[i] for i in rows],
        )
        return out if then is None else then(out, folder)

    return apply


def _largest_rectangle(mask_HW: np.ndarray) -> tuple[int, int, int, int]:
    """Return (x0, y0, x1, y1) of the largest rectangle on a coarse grid in which at least ``COVERED`` of the mask is set."""
    total = np.pad(mask_HW.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    ys, xs = (np.unique(np.linspace(0, n, 41).astype(int)) for n in mask_HW.shape)
    corner = total[np.ix_(ys, xs)]
    best, found = 0, (0, 0, mask_HW.shape[1], mask_HW.shape[0])
    for i, y0 in enumerate(ys):
        for j, y1 in enumerate(ys[i + 1 :], i + 1):
            column = corner[j] - corner[i]
            area = (y1 - y0) * (xs[None] - xs[:, None])
            covered = column[None] - column[:, None]
            area = np.where((area > 0) & (covered >= COVERED * area), area, 0)
            if area.max() > best:
                best = int(area.max())
                k, m = np.unravel_index(int(area.argmax()), area.shape)
                found = (int(xs[k]), int(y0), int(xs[m]), int(y1))
    return found


def background(colour: int) -> SectionVariant:
    """Return a variant whose background is replaced by one grey value, as by a segmentation or in fluorescence."""

    def apply(section: Section, folder: Path) -> Section:
        with section.open_slide() as slide:
            context = build_context(section, slide, 224.0)
        pixels = section.load_image()
        mask = Image.fromarray(context.tissue).resize(pixels.shape[1::-1], Image.Resampling.NEAREST)
        pixels[~np.asarray(mask)] = colour
        return _with_image(section, pixels, folder)

    return apply


def _dyes(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the amounts of haematoxylin and eosin, float (H, W) each, by Ruifrok and Johnston's colour deconvolution."""
    density = -np.log10((pixels + 1) / (_glass(pixels) + 1))
    amount = np.maximum(density @ np.linalg.inv(DYES_33).astype(np.float32), 0)
    return amount[..., 0], amount[..., 1]


def _ihc(pixels: np.ndarray) -> np.ndarray:
    """Return pixels with DAB instead of eosin and most haematoxylin, as in an antibody stain with a weak counterstain."""
    haematoxylin, eosin = _dyes(pixels)
    brown = eosin + 0.7 * haematoxylin
    density = 0.3 * haematoxylin[..., None] * DYES_33[0] + brown[..., None] * DYES_33[2]
    return _glass(pixels) * 10**-density


def _fluorescence(pixels: np.ndarray) -> np.ndarray:
    """Return pixels with nuclei in blue and autofluorescence in green on a black background."""
    haematoxylin, eosin = _dyes(pixels)
    blue, green = 255 * (1 - np.exp(-2.5 * haematoxylin)), 120 * (1 - np.exp(-2.5 * eosin))
    return np.stack([0.3 * green, green, blue], -1)


def _slope(shape: tuple[int, int]) -> np.ndarray:
    return np.linspace(0.6, 1, shape[1], dtype=np.float32)[None, :, None]


NONE: frozenset[str] = frozenset()
SECTION_VARIANTS: dict[str, tuple[frozenset[str], SectionVariant]] = {
    "exposure 30 %": (NONE, lit(lambda shape: 0.3)),
    "exposure 45 %": (NONE, lit(lambda shape: 0.45)),
    "exposure 70 %": (NONE, lit(lambda shape: 0.7)),
    "exposure 105 %": (NONE, lit(lambda shape: 1.05)),
    "warm lamp": (NONE, lit(lambda shape: np.array([1, 0.96, 0.85], np.float32))),
    "uneven lamp, 60 to 100 %": (NONE, lit(_slope)),
    "1.5 times the um per px": (NONE, scanned_at(1.5)),
    "twice the um per px": (NONE, scanned_at(2.0)),
    "stain at 50 %": (NONE, stained(0.5)),
    "stain at 160 %": (NONE, stained(1.6)),
    "background black": (NONE, background(0)),
    "background grey": (NONE, background(160)),
    "tissue fills the frame": (NONE, filled()),
    "tissue fills the frame, exposure 45 %": (NONE, filled(lit(lambda shape: 0.45))),
    "tissue fills the frame, stain at 50 %": (NONE, filled(stained(0.5))),
    "antibody stain (DAB and haematoxylin)": (frozenset({"stain"}), repainted(_ihc)),
    "fluorescence (nuclei and autofluorescence)": (frozenset({"stain"}), repainted(_fluorescence)),
}
"""{variant: (the checks that must report it, the function that applies it)}."""
