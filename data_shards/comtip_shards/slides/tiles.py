"""Tile extraction at a common physical size and resolution, and stain normalisation.

A model must not be able to distinguish sections by their scanner. Tiles therefore have a fixed width in um, images finer than
a common um per px are downsampled to it first, and optionally each section's optical density is normalised to a fixed mean
and standard deviation. Optical density is -log10((value + 1) / 256) per channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from comtip_shards.errors import SourceError

FIELD_UM, FIELD_PX = 112.0, 224
"""Width of the default tile in um and in px: 0.5 um per px (20x), as in HEST-1k and the encoders trained on it."""
REFERENCE_MEAN, REFERENCE_STD = (0.20, 0.33, 0.20), (0.13, 0.17, 0.12)
"""Target mean and standard deviation of the optical density in stain normalisation, as in a typical H&E image."""
TISSUE_DENSITY = (0.05, 1.5)
"""Range of the mean optical density of a tissue pixel; lower is glass, higher is ink or a black border."""
_DENSITY = -np.log10((np.arange(256, dtype=np.float64) + 1) / 256)


def shrunk_size(size: tuple[int, int], mpp: float, min_mpp: float) -> tuple[tuple[int, int], float, float]:
    """Return ((width, height), um per px, scale factor) of an image downsampled to ``min_mpp``; unchanged if it is not finer."""
    if mpp >= min_mpp:
        return size, mpp, 1.0
    shrink, (width, height) = mpp / min_mpp, size
    small = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    return small, mpp * width / small[0], small[0] / width


def check_tile_um(um: float) -> float:
    """Return the width of a tile in um, or raise :class:`SourceError` if it is not between 1 and 10000."""
    if not 1 <= um <= 10_000:
        raise SourceError(f"`tile_um` {um:g}: out of range; give the width of a tile in um, 1 to 10000")
    return um


def limit_resolution(image_HW3: np.ndarray, mpp: float, min_mpp: float) -> tuple[np.ndarray, float, float]:
    """Downsample an image to about ``min_mpp`` um per px if its resolution is finer; another image is returned unchanged.

    Returns
    -------
    image
        uint8, downsampled or as given.
    mpp
        um per px of the returned image.
    scale
        Factor by which positions in px of the given image are multiplied; 1 for an unchanged image.
    """
    size, small_mpp, scale = shrunk_size((image_HW3.shape[1], image_HW3.shape[0]), mpp, min_mpp)
    if scale == 1.0:
        return image_HW3, mpp, 1.0
    small = Image.fromarray(image_HW3).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(small), small_mpp, scale


def cut_tiles(image_HW3: np.ndarray, xy_N2: np.ndarray, width_px: float, out_px: int) -> np.ndarray:
    """Cut square tiles around positions and resample them.

    Parameters
    ----------
    image_HW3
        uint8 RGB.
    xy_N2
        Centres, x (column) and y (row) in px of the image; 0 is the image's edge, not the centre of a pixel.
    width_px
        Width of a tile in px of the image; may be fractional.
    out_px
        Width S of the returned tiles.

    Returns
    -------
    uint8 (N, S, S, 3); white outside the image.
    """
    size = (image_HW3.shape[1], image_HW3.shape[0])
    out = np.empty((len(xy_N2), out_px, out_px, 3), np.uint8)
    windows = cut_windows(lambda b: image_HW3[b[1] : b[3], b[0] : b[2]], size, xy_N2, width_px, out_px)
    for i, tile in enumerate(windows):
        out[i] = tile
    return out


def cut_windows(
    read: Callable[[tuple[int, int, int, int]], np.ndarray],
    size: tuple[int, int],
    xy_N2: np.ndarray,
    width_px: float,
    out_px: int,
) -> Iterator[np.ndarray]:
    """Yield the tiles of :func:`cut_tiles` from an image that is read in windows.

    Parameters
    ----------
    read
        Returns uint8 RGB of a window (x0, y0, x1, y1) inside the image.
    size
        (width, height) of the image.
    xy_N2, width_px, out_px
        As for :func:`cut_tiles`.
    """
    width, height = size
    half = width_px / 2
    # Support of the bicubic filter beyond the tile.
    margin = math.ceil(2 * max(1.0, width_px / out_px)) + 1
    for x, y in np.asarray(xy_N2, np.float64):
        # A spot may be just outside the image; its tile is then mostly white.
        cx, cy = float(np.clip(x, -half, width + half)), float(np.clip(y, -half, height + half))
        left, top = math.floor(cx - half) - margin, math.floor(cy - half) - margin
        right, bottom = math.ceil(cx + half) + margin, math.ceil(cy + half) + margin
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        window = np.full((bottom - top, right - left, 3), 255, np.uint8)
        if x0 < x1 and y0 < y1:
            window[y0 - top : y1 - top, x0 - left : x1 - left] = read((x0, y0, x1, y1))
        box = (cx - half - left, cy - half - top, cx + half - left, cy + half - top)
        yield np.asarray(Image.fromarray(window).resize((out_px, out_px), Image.Resampling.BICUBIC, box=box))


@dataclass(frozen=True)
class StainStats:
    """Mean and standard deviation of a section's optical density over tissue pixels, per channel."""

    od_mean: tuple[float, float, float]
    od_std: tuple[float, float, float]


def stain_stats(tiles_NSS3: Iterable[np.ndarray]) -> StainStats:
    """Return a section's stain statistics from its tiles, uint8 (S, S, 3) each; without tissue, the reference values."""
    # A histogram of the 256 values of tissue pixels per channel is sufficient for the mean and standard deviation.
    table = _DENSITY.astype(np.float32)
    counts = np.zeros((3, 256))
    for tile in tiles_NSS3:
        density = table[tile].mean(axis=-1)
        pixels = tile[(density > TISSUE_DENSITY[0]) & (density < TISSUE_DENSITY[1])]
        for channel in range(3):
            counts[channel] += np.bincount(pixels[:, channel], minlength=256)
    total = counts.sum(1)
    if total.min() == 0:
        return StainStats(REFERENCE_MEAN, REFERENCE_STD)
    mean = counts @ _DENSITY / total
    variance = np.maximum(counts @ _DENSITY**2 / total - mean**2, 0)
    std = np.maximum(np.sqrt(variance), 1e-3)
    return StainStats(_rounded(mean), _rounded(std))


def normalise_stain(tiles_NSS3: np.ndarray, stats: StainStats) -> np.ndarray:
    """Return tiles, uint8 (..., 3), of a section with statistics ``stats``, normalised to the reference; uint8, same shape."""
    density = (_DENSITY[None] - np.array(stats.od_mean)[:, None]) / np.array(stats.od_std)[:, None]
    density = density * np.array(REFERENCE_STD)[:, None] + np.array(REFERENCE_MEAN)[:, None]
    table = np.clip(np.rint(256 * 10.0**-density - 1), 0, 255).astype(np.uint8)
    out = np.empty_like(tiles_NSS3)
    for channel in range(3):
        out[..., channel] = table[channel][tiles_NSS3[..., channel]]
    return out


def _rounded(values: np.ndarray) -> tuple[float, float, float]:
    """Round to 6 decimals, so that the manifest stores exactly the values in use."""
    a, b, c = (round(float(v), 6) for v in values)
    return a, b, c
