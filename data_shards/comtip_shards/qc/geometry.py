"""Checks of positions: on tissue, at the stated scale, in px of this image, centres rather than corners, orientation.

Three of them compare the *fit* of expression to the image (:mod:`comtip_shards.qc.context`) for the given positions with
the fit for transformed ones. They report a transformation only if its fit is better by the margin stated here, and exceeds
that of shifted maps, which fit by chance only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isfinite

import numpy as np

from comtip_shards.qc.context import CELL, SectionContext
from comtip_shards.qc.result import FAIL, OK, WARN, Finding, graded, not_applicable
from comtip_shards.sources.geometry import platform_pitch

ON_TISSUE_WARN, ON_TISSUE_FAIL = 0.9, 0.6
"""Share of spots on tissue. A careful in-tissue list has at most a tenth of its spots on torn or empty areas; with four in
ten on glass, the list or the positions are wrong."""
SCALE_WARN, SCALE_FAIL = 0.05, 0.2
"""Relative error of the spacing. Arrays are printed to within 2 % and positions detected to within 1 %; the common errors
(um per px of another scanner, 20x for 40x, pixels of a downsampled image) exceed 25 %."""
RESOLUTION_MARGIN = 0.1
"""Minimum gain of fit (share of variance) of another scale; of 700 scales tried, some fit better by chance."""
AGREED_MARGIN, AGREED_SCALE = 0.03, 0.05
"""Minimum gain of fit of a scale that also gives the spots their known spacing; maximum relative error of that spacing."""
SHIFT_MARGIN = 0.05
"""Minimum gain of fit of another scale over the best shift; far fewer shifts than scales are tried."""
MIN_TISSUE = 0.02
"""Minimum share of the tissue in the bounding box of the spots: a map that is shrunk to a few px fits any smooth expression."""
RESOLUTION_RANGE, RESOLUTION_MIN = 32.0, 1.15
"""Largest factor searched, and smallest factor reported (or their reciprocals); hires images are 2 to 20 times smaller than full
resolution."""
CORNER_MARGIN = 0.02
"""Minimum gain of fit of a shift. On good sections the best shift gains at most 0.005, and a shift by half a spot's width
loses 0.03 to 0.15."""
ORIENTATION_MARGIN = 0.05
"""Minimum gain of fit of another orientation; on good sections every other one loses 0.07 or more."""
HALF_TILES_UM = (56.0, 112.0)
"""Half widths of common tiles (112 um: 224 px at 0.5 um per px; 224 um: 224 px at 1), tried in addition to half a tile and
half a spot."""


TOO_FEW = "too few spots with counts to decide"


def on_tissue(context: SectionContext) -> Finding:
    """Check the share of spots on tissue, which is detected by its optical density."""
    off = np.flatnonzero(~context.on_tissue(context.xy))
    figure = 1 - len(off) / len(context.xy)
    return graded(
        "on_tissue",
        figure,
        ON_TISSUE_WARN,
        ON_TISSUE_FAIL,
        f"{figure:.1%} of {len(context.xy)} spots are on tissue",
        "check the overlay: leave out spots off tissue (in_tissue = 0), or give positions in px of this image"
        if context.section.n_pooled is None
        else "check the overlay: give the image of this section (Xenium: with its alignment)",
        spots=tuple(off.tolist()),
    )


def scale(context: SectionContext) -> Finding:
    """Compare the spot spacing in um, by the stated um per px, with the stated spacing and that of the platform."""
    known, expected = platform_pitch(context.section.meta.platform), _known_spacing(context)
    if not isfinite(expected) or not isfinite(context.pitch_px):
        return not_applicable(
            "scale", "the spot distance is not known" if not isfinite(expected) else "spots are not on a lattice"
        )
    measured = context.pitch_px * context.mpp
    error = max(measured / expected, expected / measured) - 1
    message = f"at the stated {context.section.meta.mpp:.4g} um per px, spots are {measured:.1f} um apart, expected {expected:g}"
    if isfinite(known) and abs(known / expected - 1) > SCALE_WARN:
        message += f" ({context.section.meta.platform} has {known:g})"
        error = max(error, abs(known / expected - 1))
    return graded(
        "scale",
        error,
        SCALE_WARN,
        SCALE_FAIL,
        message,
        # The factor also holds for `mpp`, which refers to px of the positions: the image may be hires or lowres.
        f"multiply the stated um per px (`mpp`) by {expected / measured:.4g} if the spacing of the array is right; otherwise correct the "
        "platform (`platform`), or spot_pitch_um in a manifest.tsv",
    )


def full_or_hires(context: SectionContext) -> Finding:
    """Check whether positions are px of another resolution of this image, such as full resolution or hires."""
    name = "full_or_hires"
    if not _suspicious(context):
        return Finding(
            name=name,
            status=OK,
            figure=1.0,
            threshold=RESOLUTION_MIN,
            message="positions cover the tissue of the image at the expected distance",
        )
    if not context.can_fit:
        return not_applicable(name, TOO_FEW)
    best, fit = _best_scale(context)
    agreed = _gives_known_spacing(context, best)
    rival = max(
        context.as_given + (AGREED_MARGIN if agreed else RESOLUTION_MARGIN),
        best_turn(context)[2],
        best_shift(context)[1] + (0.0 if agreed else SHIFT_MARGIN),
        context.chance(context.xy * best),
    )
    if max(best, 1 / best) < RESOLUTION_MIN or fit < rival:
        message = (
            f"no other scale fits clearly better (factor {best:.3g}: fit {fit:.2f}, as given {context.as_given:.2f})"
        )
        return Finding(name=name, status=OK, figure=1.0, threshold=RESOLUTION_MIN, message=message)
    near = [f"1 / {k}" for k, v in context.hires.items() if abs(best * v - 1) < 0.03]
    near += [k for k, v in context.hires.items() if abs(best / v - 1) < 0.03]
    message = (
        f"expression fits the image better if positions are multiplied by {best:.4g}{f' ({near[0]})' if near else ''}: "
        f"fit {fit:.2f}, as given {context.as_given:.2f}"
    )
    return Finding(
        name=name,
        status=FAIL,
        figure=round(best, 4),
        threshold=RESOLUTION_MIN,
        message=message,
        advice="positions are px of another resolution of this image: give the image they belong to (`image`), or scale them",
    )


def _suspicious(context: SectionContext) -> bool:
    """Return whether another scale must be searched for; the search takes a second and may find a chance fit."""
    height, width = context.picture_HW3.shape[:2]
    right, low = context.xy.max(0)
    corner = right < 0.6 * width and low < 0.6 * height
    outside = (context.xy < -1).any() or right > width + 1 or low > height + 1
    return bool(corner or outside) or on_tissue(context).status != OK or scale(context).status != OK


def _known_spacing(context: SectionContext) -> float:
    """Return the spacing of the spots in um, as stated, or else that of the platform; NaN if neither is known."""
    stated, known = context.section.meta.spot_pitch_um, platform_pitch(context.section.meta.platform)
    return stated if isfinite(stated) and stated > 0 else known


def _gives_known_spacing(context: SectionContext, factor: float) -> bool:
    """Return whether the spots have the known spacing only after multiplying their positions by ``factor``."""
    expected, measured = _known_spacing(context), context.pitch_px * context.mpp
    if not isfinite(expected) or not isfinite(measured):
        return False
    return abs(measured * factor / expected - 1) <= AGREED_SCALE < abs(measured / expected - 1)


def _tissue_between(context: SectionContext, low: np.ndarray, high: np.ndarray) -> float:
    """Return the share of the tissue in the rectangle from ``low`` to ``high``, (x, y) in px of the downsampled image."""
    x0, y0, x1, y1 = (max(0, int(v / CELL)) for v in (*low, *(high + CELL)))
    total = max(1, int(np.count_nonzero(context.tissue)))
    return np.count_nonzero(context.tissue[y0:y1, x0:x1]) / total


def _best_scale(context: SectionContext) -> tuple[float, float]:
    """Return the best scale, (factor on positions, fit with it), from a grid search in 1 % steps that is then refined."""
    steps = int(np.log(RESOLUTION_RANGE) / 0.01)
    limits = np.array([context.picture_HW3.shape[1], context.picture_HW3.shape[0]]) * 1.05
    # Exclude factors that move a position outside the image, or all positions into a small part of the image or of the tissue.
    low, high = context.xy.min(0), context.xy.max(0)
    factors = [
        f
        for f in np.exp(0.01 * np.arange(-steps, steps + 1))
        if (high * f <= limits).all()
        and ((high - low) * f).max() > 0.05 * limits.max()
        and _tissue_between(context, low * f, high * f) >= MIN_TISSUE
    ] or [1.0]
    fits = np.array([context.fit(context.xy * f) for f in factors])
    fine = {
        f * g: context.fit(context.xy * f * g)
        for f in np.array(factors)[np.argsort(-fits, kind="stable")[:8]]
        for g in np.linspace(0.993, 1.007, 8)
    }
    best = max(fine, key=lambda f: fine[f])
    return float(best), fine[best]


def best_shift(context: SectionContext) -> tuple[tuple[float, float], float]:
    """Return the best-fitting shift of all positions, um in x and y, and its fit."""
    if "shift" not in context.memo:
        halves = sorted({context.spot_um / 2, context.tile_um / 2, *HALF_TILES_UM})
        tried = {
            (dx * half, dy * half): context.fit(context.xy + np.array([dx, dy]) * half / context.mpp)
            for half in halves
            if half >= context.mpp
            for dx in (-1, 0, 1)
            for dy in (-1, 0, 1)
            if dx or dy
        }
        context.memo["shift"] = max(tried.items(), key=lambda item: item[1])
    return context.memo["shift"]


def corner(context: SectionContext) -> Finding:
    """Check whether positions are corners of tiles or spots instead of centres, or are shifted relative to the tissue."""
    name = "corner"
    if not context.can_fit:
        return not_applicable(name, TOO_FEW)
    (dx, dy), fit = best_shift(context)
    gain = fit - context.as_given
    message = f"shifted by ({dx:+.0f}, {dy:+.0f}) um: fit {fit:.2f}, as given {context.as_given:.2f}"
    if gain < CORNER_MARGIN or fit < context.chance(context.xy):
        message = f"no shift fits better (best {message})"
        return Finding(name=name, status=OK, figure=round(gain, 4), threshold=CORNER_MARGIN, message=message)
    advice = "positions are shifted from their tissue: check the alignment of image and array"
    if dx == dy > 0:
        advice = f"positions are top-left corners: add half the width of a tile or spot ({dx:g} um) to x and y"
    return Finding(
        name=name, status=WARN, figure=round(gain, 4), threshold=CORNER_MARGIN, message=message, advice=advice
    )


_TURNS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "mirrored left to right": lambda u, v: (-u, v),
    "mirrored top to bottom": lambda u, v: (u, -v),
    "turned by 180 degrees": lambda u, v: (-u, -v),
    "with x and y swapped": lambda u, v: (v, u),
    "with x and y swapped, then mirrored left to right": lambda u, v: (-v, u),
    "with x and y swapped, then mirrored top to bottom": lambda u, v: (v, -u),
    "with x and y swapped, then turned by 180 degrees": lambda u, v: (-v, -u),
}


def best_turn(context: SectionContext) -> tuple[str, np.ndarray, float]:
    """Return the best-fitting other orientation: description, positions, fit."""
    if "turn" not in context.memo:
        tried = [(what, xy, context.fit(xy)) for what, xy in turned(context)]
        context.memo["turn"] = max(tried, key=lambda item: item[2])
    return context.memo["turn"]


def orientation(context: SectionContext) -> Finding:
    """Check whether expression fits the image better with x and y swapped, mirrored or rotated."""
    name = "orientation"
    if not context.can_fit:
        return not_applicable(name, TOO_FEW)
    best, xy, fit = best_turn(context)
    gain = fit - context.as_given
    chance = context.chance(xy if gain > 0 else context.xy)
    message = f"{best}: fit {fit:.2f}, as given {context.as_given:.2f}, by chance below {chance:.2f}"
    if max(fit, context.as_given) < chance:
        return not_applicable(name, f"expression does not fit the image in any orientation (best {message})")
    if gain < ORIENTATION_MARGIN or best_shift(context)[1] >= fit:
        return Finding(
            name=name,
            status=OK,
            figure=round(gain, 4),
            threshold=ORIENTATION_MARGIN,
            message=f"no other orientation is clearly better (next {message})",
        )
    return Finding(
        name=name,
        status=FAIL,
        figure=round(gain, 4),
        threshold=ORIENTATION_MARGIN,
        message=f"positions fit {message}",
        advice="check which column is x (columns of the image) and y (rows), and whether the image was mirrored or rotated",
    )


def turned(context: SectionContext) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (description, positions) for the seven other orientations, each within the image and within the spots' bounding box."""
    height, width = context.picture_HW3.shape[:2]
    middle = np.array([width, height]) / 2
    box = (context.xy.min(0) + context.xy.max(0)) / 2
    for what, turn in _TURNS.items():
        # An image rotated by 90 degrees has its sides exchanged: positions came from a frame of H x W.
        frame = middle[::-1] if "swapped" in what else middle
        yield what, np.column_stack(turn(*(context.xy - frame).T)) + middle
        yield f"{what} (within the bounding box of the spots)", np.column_stack(turn(*(context.xy - box).T)) + box
