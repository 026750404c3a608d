"""Tissue mask of a section: the areas that differ from glass.

The colour of glass is measured in the image itself, from bright, smooth and nearly colourless areas, so that exposure and
illumination do not matter. An image without such areas has no background: everything except grey frames, ink and black
borders is tissue.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

GLASS_RANGE = (0.02, 0.03)
"""Bounds of the density threshold between glass and tissue. The threshold is half of Otsu's, clipped to them: Otsu's lies midway
between glass and the mean of tissue, and pale tissue is nearer to glass. Noise of glass is below 0.03 in every section of
``samples/``."""
NO_GLASS = 0.06
"""In an image without glass: maximum density, above that of the lightest areas, at which cells without hue count as tissue."""
SPREAD, TEXTURE = 0.09, 0.012
"""Maximum difference between channels, and local standard deviation, of the optical density of glass: illumination may be warm
or cool, but glass is smooth. Tissue without visible structure at 4 um per px is rarer than glass and denser."""
NEAR, MIN_GLASS = 0.06, 0.005
"""Glass is at most this much denser than the brightest smooth areas nearby, and covers at least this share of the image."""
MUCH_GLASS = 0.05
"""Minimum share of the image that bright, smooth areas must cover to be accepted as glass without further evidence. A smaller share
may be pale, smooth tissue in an image without glass, and a plane fitted to it does not hold elsewhere."""
MAX_MAGENTA = 0.02
"""Maximum excess of the green density of glass over the mean of its red and blue density: eosin and haematoxylin are magenta,
illumination is not."""
MAX_TINTED, MUCH_TINTED = 0.045, 0.15
"""The same maximum for glass that eosin has stained; it applies if very smooth areas cover at least the second share of the image.
On the sections of ``samples/``, pink glass covers 0.3 or more of the image, and equally smooth and pale tissue at most 0.04, also
with half the stain."""
COLOURLESS = 0.1
"""Maximum share of colourless areas in stained glass: if there are more, they are the glass, and the others pale tissue."""
MIN_COLOUR = 0.2
"""Minimum difference of green and blue density, relative to the distance from glass. Eosin and haematoxylin absorb green
most; grey frames printed on the slide, dust and pens do not."""
MAX_ABOVE = 0.3
"""Maximum density above glass that is used; denser cells are scaled down to it, which keeps their hue."""


def tissue_mask(density_HW3: np.ndarray, glass_HW3: np.ndarray | None, sigma: float) -> np.ndarray:
    """Return which cells show tissue.

    Parameters
    ----------
    density_HW3
        Optical density per channel, float32; 0 where the image is black.
    glass_HW3
        Optical density of glass, from :func:`glass_density`; None if the image shows none.
    sigma
        Smoothing width in cells, so that gaps between nuclei count as tissue.

    Returns
    -------
    bool (H, W).
    """
    seen = over_channels(density_HW3) > 0
    if not seen.any():
        return np.zeros(seen.shape, bool)
    above = density_HW3 - (lightest(density_HW3, seen) if glass_HW3 is None else glass_HW3)
    above *= np.minimum(1, MAX_ABOVE / np.maximum(np.abs(above).max(-1), 1e-6))[..., None]
    above[~seen] = 0
    distance = ndimage.gaussian_filter(np.sqrt(over_channels(np.square(above))), sigma)
    colour = ndimage.gaussian_filter(above[..., 1] - above[..., 2], sigma)
    if glass_HW3 is None:
        return seen & ((distance <= NO_GLASS) | (colour > MIN_COLOUR * distance))
    threshold = np.clip(otsu(np.minimum(distance[seen], 2 * NO_GLASS)) / 2, *GLASS_RANGE)
    return (distance > threshold) & (colour > MIN_COLOUR * distance) & seen


def glass_density(density_HW3: np.ndarray, seen: np.ndarray) -> np.ndarray | None:
    """Return the optical density of glass per cell and channel, float32 (H, W, 3); None if the image shows no glass.

    A plane is fitted to each channel, because illumination is uneven. ``seen``, bool (H, W), excludes black areas.
    """
    mean = over_channels(density_HW3)
    smooth = ndimage.uniform_filter(mean, 5)
    texture = np.sqrt(np.maximum(ndimage.uniform_filter(np.square(mean), 5) - np.square(smooth), 0))
    flat = ndimage.binary_erosion(seen, iterations=2) & (texture < TEXTURE)
    flat &= density_HW3.max(-1) - density_HW3.min(-1) < SPREAD
    red, green, blue = (density_HW3[..., c] for c in range(3))
    magenta = ndimage.uniform_filter(green - (red + blue) / 2, 5)
    tinted, colourless = flat & (magenta < MAX_TINTED), flat & (magenta < MAX_MAGENTA)
    much = tinted.mean() >= max(MUCH_TINTED, colourless.mean() / COLOURLESS)
    flat = tinted if much and np.median(texture[tinted]) < TEXTURE / 4 else colourless
    if flat.mean() < MIN_GLASS:
        return None
    glass = flat & (smooth <= np.quantile(smooth[flat], 0.02) + NEAR)
    height, width = mean.shape
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij"), -1)
    design = np.concatenate([np.ones((height, width, 1)), grid], -1).astype(np.float32)
    for _ in range(4):  # refit the background plane; each time it includes darker areas
        if glass.mean() < MIN_GLASS:
            return None
        step = max(1, int(glass.sum() // 20_000))
        plane, *_ = np.linalg.lstsq(design[glass][::step], density_HW3[glass][::step], rcond=None)
        level = design @ plane.astype(np.float32)
        glass = flat & (np.abs(mean - over_channels(level)) <= NEAR / 2)
    return level if glass.mean() >= MUCH_GLASS or _is_glass(level, texture[glass]) else None


def _is_glass(level_HW3: np.ndarray, texture: np.ndarray) -> bool:
    """Return whether areas that cover a small share of the image are glass: very smooth, colourless and of even density."""
    magenta = level_HW3[..., 1] - (level_HW3[..., 0] + level_HW3[..., 2]) / 2
    smooth = texture.size > 0 and np.median(texture) < TEXTURE / 4
    return bool(smooth and magenta.max() < MAX_MAGENTA and np.ptp(over_channels(level_HW3)) < NEAR)


def lightest(density_HW3: np.ndarray, seen: np.ndarray) -> np.float32:
    """Return the optical density that exposure, not stain, adds to an image.

    It is the median over the lightest 1 % of cells, of which each counts with its lowest channel.
    """
    mean = over_channels(density_HW3)
    light = density_HW3[seen & (mean <= np.quantile(mean[seen], 0.01))]
    return np.float32(np.median(light.min(-1)))


def over_channels(values_HW3: np.ndarray) -> np.ndarray:
    """Return the mean over channels; ten times as fast as numpy's mean over a last axis of 3."""
    return np.asarray((values_HW3[..., 0] + values_HW3[..., 1] + values_HW3[..., 2]) / 3)


def otsu(values: np.ndarray) -> float:
    """Return Otsu's threshold, which maximises the variance between the two classes."""
    count, edges = np.histogram(values, 256)
    middle = (edges[1:] + edges[:-1]) / 2
    below, mass = np.cumsum(count), np.cumsum(count * middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.square(mass[-1] * below / below[-1] - mass) / (below * (below[-1] - below))
    return float(middle[np.nanargmax(between)]) if np.isfinite(between).any() else float(middle[0])
