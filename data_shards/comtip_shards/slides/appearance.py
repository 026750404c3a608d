"""Detect whether an image is a brightfield scan of haematoxylin and eosin (H&E), from the colours of its tissue.

Optical densities of dyes add up. Haematoxylin absorbs red about as much as green, eosin hardly absorbs red, and neither
absorbs blue most. The ratio of red to green density therefore separates eosin without haematoxylin from H&E, and the
ratio of blue to green separates brown (DAB) from H&E. Fluorescence on black has purer colours than any stain.
"""

from __future__ import annotations

import numpy as np

COLOURED = 20
"""Minimum difference between the largest and smallest channel (0 to 255) of a pixel that is not grey."""
DENSITY = (0.08, 1.3)
"""Range of the mean optical density of tissue; lower is glass, higher is a border or ink."""
MIN_COLOURED = 0.02
"""Minimum share of pixels that are coloured tissue in a stained image."""
RED_TO_GREEN = (0.35, 1.6)
"""Range of the median over tissue of red to green density: 0.63 to 0.97 in ``samples/`` and a 10x heart, 0.07 in pure eosin."""
BLUE_TO_GREEN = (0.2, 0.85)
"""Range of the median over tissue of blue to green density: 0.43 to 0.68 in the same sections."""
MAX_SATURATION = 0.8
"""Maximum of the median over tissue of (largest - smallest channel) / largest. Light that passes stained tissue keeps every colour:
the sections of ``samples/`` have 0.15 to 0.3, and 0.6 at 30 % of their exposure. Fluorescence dyes on black have 0.95."""
LIT, MAX_GAIN = 230, 4.0
"""A darker image is brightened until its brightest 1 % reach the first value, at most by the factor of the second."""
MAX_PX = 250_000
"""Larger images are subsampled to about this many pixels."""
_DENSITY_OF = -np.log10((np.arange(256) + 1) / 256).astype(np.float32)


def looks_like_he(rgb_HW3: np.ndarray) -> tuple[bool, str]:
    """Return whether an image of tissue may be H&E, and the reason.

    Parameters
    ----------
    rgb_HW3
        uint8 thumbnail, or concatenated tiles.

    Returns
    -------
    is_he, reason
        The reason states what was measured.

    Raises
    ------
    ValueError
        Not a uint8 RGB image.
    """
    rgb = np.asarray(rgb_HW3)
    if rgb.ndim != 3 or rgb.shape[-1] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"the image is {rgb.dtype} of shape {rgb.shape}; pass uint8 (H, W, 3) RGB")
    step = max(1, int((rgb.shape[0] * rgb.shape[1] / MAX_PX) ** 0.5))
    flat = _brightened(rgb[::step, ::step].reshape(-1, 3))
    density = _DENSITY_OF[flat]
    mean = density.mean(axis=1)
    tissue = (mean > DENSITY[0]) & (mean < DENSITY[1])
    coloured = tissue & (flat.max(axis=1).astype(np.int16) - flat.min(axis=1) > COLOURED)
    share = float(coloured.mean()) if len(flat) else 0.0
    if share < MIN_COLOURED:
        what = (
            "mostly black" if (mean >= DENSITY[1]).mean() > 0.5 else "grey" if tissue.mean() > MIN_COLOURED else "blank"
        )
        return False, f"{what}: only {share:.1%} of it is coloured tissue"
    red, green, blue = density[coloured].T
    green = np.maximum(green, 1e-3)
    r, b = float(np.median(red / green)), float(np.median(blue / green))
    measured = f"optical density of tissue, red to green {r:.2f}, blue to green {b:.2f}"
    if r < RED_TO_GREEN[0]:
        return False, f"pink without haematoxylin, like pure eosin ({measured}; H&E has red to green near 0.8)"
    if b > BLUE_TO_GREEN[1]:
        return False, f"brown or yellow, like an antibody stain ({measured}; H&E has blue to green near 0.5)"
    brightest, dimmest = flat[coloured].max(axis=1).astype(float), flat[coloured].min(axis=1)
    saturation = float(np.median((brightest - dimmest) / brightest))
    if saturation > MAX_SATURATION:
        return (
            False,
            f"pure colours on black, like fluorescence (saturation {saturation:.2f}; H&E is below {MAX_SATURATION})",
        )
    if r > RED_TO_GREEN[1] or b < BLUE_TO_GREEN[0]:
        return False, f"blue or green, like fluorescence or another dye ({measured})"
    return True, f"pink and purple ({measured})"


def _brightened(flat_N3: np.ndarray) -> np.ndarray:
    """Brighten the pixels of an underexposed image, uint8 (N, 3), by one gain for all channels; others are returned unchanged."""
    lit = flat_N3[flat_N3.min(axis=1) < 255].max(axis=1)  # pure white surrounds an image, whatever its exposure
    if not len(lit):
        return flat_N3
    gain = min(MAX_GAIN, LIT / max(1.0, float(np.percentile(lit, 99))))
    if gain <= 1:
        return flat_N3
    return np.clip(np.rint(flat_N3 * gain), 0, 255).astype(np.uint8)
