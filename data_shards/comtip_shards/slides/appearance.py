"""Whether a picture can be a brightfield scan of haematoxylin and eosin, judged by the colours of its tissue.

Optical densities add up where light passes through dyes. Haematoxylin takes red about as much as green, eosin hardly
takes red at all, and neither takes blue most. So the ratio of red to green density tells eosin alone from both, and
that of blue to green tells brown (DAB) and blue light on black from both.
"""

from __future__ import annotations

import numpy as np

COLOURED = 20
"""Largest minus smallest channel, 0 to 255, from which on a pixel is not grey."""
DENSITY = (0.08, 1.3)
"""Mean optical density of tissue; below is glass, above is a border or ink."""
MIN_COLOURED = 0.02
"""Share of all pixels that must be coloured tissue for a picture to be judged as stained."""
RED_TO_GREEN = (0.35, 1.6)
"""Median over tissue. The sections of ``samples/`` and a 10x heart lie at 0.63 to 0.97, eosin alone at 0.07."""
BLUE_TO_GREEN = (0.2, 0.85)
"""Median over tissue. The same sections lie at 0.43 to 0.68."""
MAX_PX = 250_000
"""Of a larger picture every n-th row and column is looked at."""
_DENSITY_OF = -np.log10((np.arange(256) + 1) / 256).astype(np.float32)


def looks_like_he(rgb_HW3: np.ndarray) -> tuple[bool, str]:
    """Tell whether a picture of tissue may be H&E, and why.

    Parameters
    ----------
    rgb_HW3
        uint8; a thumbnail is enough, tiles side by side will do too.

    Returns
    -------
    looks, reason
        The reason says what was measured, so that a person can judge.
    """
    rgb = np.asarray(rgb_HW3)
    if rgb.ndim != 3 or rgb.shape[-1] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"an RGB picture of uint8 is needed, not {rgb.dtype} of shape {rgb.shape}")
    step = max(1, int((rgb.shape[0] * rgb.shape[1] / MAX_PX) ** 0.5))
    flat = rgb[::step, ::step].reshape(-1, 3)
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
        return False, f"pink without haematoxylin, as of eosin alone ({measured}; H&E has red to green near 0.8)"
    if b > BLUE_TO_GREEN[1]:
        return False, f"brown or yellow, as of an antibody stain ({measured}; H&E has blue to green near 0.5)"
    if r > RED_TO_GREEN[1] or b < BLUE_TO_GREEN[0]:
        return False, f"blue or green, as of fluorescence or another dye ({measured})"
    return True, f"pink and purple ({measured})"
