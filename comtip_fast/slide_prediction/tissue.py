"""Tissue mask of a slide's overview.

A pixel is tissue if it is not black, and its optical density differs from that of glass and between channels. Glass is measured in
the image: the brightest areas that are colourless and smooth. An image without such areas has no second class that a threshold
could separate; it is compared with the glass of a typical scan, at the lowest threshold, so that dark scans count as tissue.
"""

from __future__ import annotations

import numpy as np
from comtip_shards.qc.tissue import otsu
from scipy import ndimage

BLACK = 1.3
"""Maximum mean optical density of tissue; darker pixels are a border of the scan, a missing tile or ink."""
GLASS_SATURATION, GLASS_TEXTURE = 0.10, 6.0
"""Maximum saturation (0 to 1) and local standard deviation (0 to 255) of glass."""
GLASS_BELOW_BRIGHTEST, MIN_GLASS = 25.0, 0.002
"""Glass is at most this much darker than the brightest areas, and is used only if it covers at least this share of the image."""
BLANK = np.full(3, 0.02, np.float32)
"""Optical density of the glass of a typical scan, used where an image shows none."""
DISTANCE_RANGE = (0.02, 0.04)
"""Bounds of the threshold of the distance from glass, in optical density. Otsu's threshold is clipped to these bounds, because
it separates dark from pale tissue where both are far from glass. The lower bound is used for an image without glass."""
MIN_COLOUR = 0.15
"""Minimum difference between channels relative to the distance from glass; frames, dust and black ink are grey."""
SMOOTH_UM = 25.0
"""Smoothing width, so that gaps between cells count as tissue."""
_DENSITY = (-np.log10((np.arange(256) + 1) / 256)).astype(np.float32)


def tissue_mask(rgb_HW3: np.ndarray, mpp: float) -> np.ndarray:
    """Return which pixels show tissue.

    Parameters
    ----------
    rgb_HW3
        uint8 RGB overview.
    mpp
        um per px of the overview.

    Returns
    -------
    bool (H, W).
    """
    density = _DENSITY[rgb_HW3]
    # Averaged over neighbours, because single nuclei in a dark scan are black as well.
    seen = ndimage.uniform_filter(density.mean(-1), 5) <= BLACK
    if not seen.any():
        return np.zeros(seen.shape, bool)
    sigma = max(1.5, SMOOTH_UM / mpp / 2)
    glass = _glass_density(rgb_HW3, seen, min(sigma, 3.0))
    above = density - (BLANK if glass is None else glass)
    above[~seen] = 0
    smooth = np.stack([ndimage.gaussian_filter(above[..., c], sigma) for c in range(3)], axis=-1)
    distance = np.sqrt(np.square(smooth).mean(-1))
    threshold = DISTANCE_RANGE[0]
    if glass is not None:
        threshold = float(np.clip(otsu(np.minimum(distance[seen], 4 * DISTANCE_RANGE[1])), *DISTANCE_RANGE))
    colour = smooth.max(-1) - smooth.min(-1)
    mask: np.ndarray = (distance > threshold) & (colour > MIN_COLOUR * distance) & seen
    return mask


def _glass_density(rgb_HW3: np.ndarray, seen: np.ndarray, sigma: float) -> np.ndarray | None:
    """Return the optical density of glass per channel, float32 (3,); None if the image shows none."""
    smooth = np.stack([ndimage.gaussian_filter(rgb_HW3[..., c].astype(np.float32), sigma) for c in range(3)], axis=-1)
    high, brightness = smooth.max(-1), smooth.mean(-1)
    gray = rgb_HW3.mean(-1, dtype=np.float32)
    variance = ndimage.gaussian_filter(np.square(gray), sigma) - np.square(ndimage.gaussian_filter(gray, sigma))
    bright = np.quantile(brightness[seen], 0.998) - GLASS_BELOW_BRIGHTEST
    glass = seen & (high - smooth.min(-1) < GLASS_SATURATION * high) & (brightness >= bright)
    glass &= variance < GLASS_TEXTURE**2
    if glass.mean() < MIN_GLASS:
        return None
    found: np.ndarray = np.median(_DENSITY[rgb_HW3[glass]], axis=0).astype(np.float32)
    return found
