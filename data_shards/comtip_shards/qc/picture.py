"""Checks of the image: sharpness, background in tiles, haematoxylin and eosin stain."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from comtip_shards.qc.context import SectionContext
from comtip_shards.qc.result import FAIL, OK, Finding, graded, not_applicable
from comtip_shards.slides.appearance import looks_like_he

BLUR_WARN, BLUR_FAIL = 0.4, 0.15
"""Strength of edges relative to edges twice as wide, see :func:`sharpness`. 1 for a scale-invariant image, 0.0625 for one whose
finest detail is many px wide; the sections of ``samples/`` have 0.5 to 0.95, and 0.08 to 0.31 after a blur of 4 or 10 um."""
BACKGROUND_WARN, BACKGROUND_FAIL = 0.4, 0.7
"""Mean share of glass in the tiles of spots on tissue. Tiles of large tissues have less than a tenth, those of a small
biopsy a quarter; if there is more, the tile is too wide, or the background was masked."""
GAPS_WARN, GAPS_FAIL = 0.15, 0.5
"""Mean share of gaps of one colour within the tissue around spots. Scanned tissue has at most 0.04."""


def blur(context: SectionContext) -> Finding:
    """Check whether the image has detail at the scale of the patches' pixels (2 um, or one px of a coarser image)."""
    if not len(context.patches_NPP3):
        return not_applicable("blur", "no spot is inside the image")
    figure = sharpness(context.patches_NPP3)
    if not np.isfinite(figure):
        return not_applicable("blur", "the image has a single colour")
    message = f"edges are {figure:.2f} times as strong as edges twice as wide"
    return graded(
        "blur",
        figure,
        BLUR_WARN,
        BLUR_FAIL,
        message,
        "the image is out of focus or enlarged: use the original scan",
    )


def sharpness(patches_NPP3: np.ndarray) -> float:
    """Return the strength of edges relative to edges twice as wide; NaN without contrast.

    It is the variance of the Laplacian relative to that at half the resolution: the lower of the ratios of 1 to 2 px and of 2 to
    4 px, because after a wide blur the edges at 1 px are only rounding errors. Each ratio is the median over patches, because
    some of them contain the border of the image.
    """
    gray = patches_NPP3.astype(np.float32).mean(-1)
    levels = [gray, half := _halved(gray), _halved(half)]
    edges = [np.array([ndimage.laplace(g)[1:-1, 1:-1].var() for g in level]) for level in levels]
    with_contrast = np.min(edges[1:], axis=0) > 1e-6
    if not with_contrast.any():
        return float("nan")
    fine, middle, coarse = (e[with_contrast] for e in edges)
    return float(min(np.median(fine / middle), np.median(middle / coarse)))


def _halved(stack_NPP: np.ndarray) -> np.ndarray:
    """Return the patches at half the resolution."""
    n, p, _ = stack_NPP.shape
    k = p // 2
    out: np.ndarray = stack_NPP[:, : 2 * k, : 2 * k].reshape(n, k, 2, k, 2).mean((2, 4))
    return out


def background(context: SectionContext) -> Finding:
    """Check the share of background in tiles, over spots on tissue.

    If the spots are further apart than a tile is wide, squares as wide as that distance are measured instead: where the image
    shows only a disc of tissue around each spot, the disc would fill most of a narrow tile.
    """
    is_tissue = context.on_tissue(context.xy)
    if not is_tissue.any():
        return not_applicable("background", "no spot is on tissue")
    pitch = context.section.meta.spot_pitch_um
    width = max(context.tile_um, pitch) if np.isfinite(pitch) else context.tile_um
    glass = context.background_share(context.xy, width)
    figure = float(glass[is_tissue].mean())
    gaps = float(context.gap_share(context.xy, width)[is_tissue].mean())
    if figure < BACKGROUND_WARN and gaps >= GAPS_WARN:
        return graded(
            "background",
            gaps,
            GAPS_WARN,
            GAPS_FAIL,
            f"{gaps:.0%} of squares of {width:g} um around spots are gaps of one colour within the tissue",
            "use the original image, which shows the tissue between the spots",
        )
    return graded(
        "background",
        figure,
        BACKGROUND_WARN,
        BACKGROUND_FAIL,
        f"squares of {width:g} um around spots are {figure:.0%} glass on average",
        f"{'cut smaller tiles (`tile_um`), or ' if width <= context.tile_um else ''}use an image that shows the tissue around the spots",
        spots=tuple(np.flatnonzero(is_tissue & (glass > BACKGROUND_FAIL)).tolist()),
    )


def stain(context: SectionContext) -> Finding:
    """Check from the colours whether the image is H&E."""
    if not len(context.patches_NPP3):
        return not_applicable("stain", "no spot is inside the image")
    is_he, reason = looks_like_he(np.concatenate(list(context.patches_NPP3)))
    if not is_he:  # exposure and illumination may hide the stain
        balanced, other = looks_like_he(np.concatenate(list(context.balanced_patches())))
        is_he, reason = (True, other) if balanced else (False, reason)
    return Finding(
        name="stain",
        status=OK if is_he else FAIL,
        figure=float(is_he),
        threshold=1.0,
        message=reason,
        advice="" if is_he else "give the H&E image (`image`): this image is not H&E, or its colours were changed",
    )
