"""Checks of the picture: sharp enough, tiles not mostly glass, stained with haematoxylin and eosin."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from comtip_shards.qc.context import SectionContext
from comtip_shards.qc.result import FAIL, OK, Finding, graded, not_applicable
from comtip_shards.slides.appearance import looks_like_he

BLUR_WARN, BLUR_FAIL = 0.3, 0.1
"""Strength of edges one px wide over that of edges two px wide, at 2 um per px or coarser. 1 for a picture that looks
alike at every scale, 0.0625 for one without anything finer than many px; the sections of ``samples/`` have 0.5 to 0.95,
and 0.08 to 0.25 after a blur of 4 um."""
BACKGROUND_WARN, BACKGROUND_FAIL = 0.4, 0.7
"""Mean share of glass in the tiles of spots that are on tissue. Tiles of whole tissue have under a tenth, those of a
small biopsy a quarter; with more the tile is too wide, or the tissue was cut out of its surroundings."""


def blur(look: SectionContext) -> Finding:
    """Whether the picture has detail as fine as its pixels."""
    if not len(look.patches_NPP3):
        return not_applicable("blur", "no spot lies inside the picture")
    figure = sharpness(look.patches_NPP3)
    if not np.isfinite(figure):
        return not_applicable("blur", "the picture is of one colour")
    said = f"edges of one px are {figure:.2f} as strong as edges of two px"
    return graded(
        "blur",
        figure,
        BLUR_WARN,
        BLUR_FAIL,
        said,
        "the image is out of focus or enlarged: use the original scan",
    )


def sharpness(patches_NPP3: np.ndarray) -> float:
    """Return the variance of the Laplacian over that of the picture at half its size; NaN without contrast."""
    gray = patches_NPP3.astype(np.float32).mean(-1)
    n, p, _ = gray.shape
    half = gray[:, : p // 2 * 2, : p // 2 * 2].reshape(n, p // 2, 2, p // 2, 2).mean((2, 4))
    fine, coarse = (np.stack([ndimage.laplace(g) for g in stack])[:, 1:-1, 1:-1].var() for stack in (gray, half))
    return float(fine / coarse) if coarse > 1e-6 else float("nan")


def background(look: SectionContext) -> Finding:
    """Share of glass in tiles, over spots that are on tissue."""
    ground = look.on_tissue(look.xy)
    if not ground.any():
        return not_applicable("background", "no spot is on tissue")
    glass = 1 - look.tissue_share(look.xy, look.tile_um)
    figure = float(glass[ground].mean())
    return graded(
        "background",
        figure,
        BACKGROUND_WARN,
        BACKGROUND_FAIL,
        f"tiles of {look.tile_um:g} um are {figure:.0%} glass on average",
        "cut smaller tiles (--tile-um), or use a picture that shows the tissue round the spots",
        spots=tuple(np.flatnonzero(ground & (glass > BACKGROUND_FAIL)).tolist()),
    )


def stain(look: SectionContext) -> Finding:
    """Whether the picture is H&E by its colours."""
    if not len(look.patches_NPP3):
        return not_applicable("stain", "no spot lies inside the picture")
    looks, reason = looks_like_he(np.concatenate(list(look.patches_NPP3)))
    return Finding(
        name="stain",
        status=OK if looks else FAIL,
        figure=float(looks),
        threshold=1.0,
        said=reason,
        advice=""
        if looks
        else "give the H&E image (--image): this one is not, or its colours are not those of a scanner",
    )
