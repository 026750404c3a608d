"""Checks of positions: on tissue, at the stated scale, in px of this image, centres and not corners, the right way round.

Three of them compare the *fit* of expression to the picture (:mod:`comtip_shards.qc.context`) as positions are with
the fit under one change. They speak only where a change fits clearly better: by the margin stated here, and better
than shifted maps do by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf, isfinite

import numpy as np

from comtip_shards.qc.context import SectionContext
from comtip_shards.qc.result import FAIL, OK, WARN, Finding, graded, not_applicable

ON_TISSUE_WARN, ON_TISSUE_FAIL = 0.9, 0.6
"""Share of spots on tissue. A careful in-tissue list has at most a tenth of its spots on torn or
empty ground; with four in ten on glass, list or positions are wrong."""
SCALE_WARN, SCALE_FAIL = 0.05, 0.2
"""Relative error of the spacing. Arrays are printed to within 2 % and positions found to within 1 %; the common faults
(another scanner's um per px, 20x for 40x, pixels of a shrunk image) are above 25 %."""
PITCH_OF_PLATFORM = (
    ("visium hd", inf),
    ("visium", 100.0),
    ("2k", 150.0),
    ("st", 200.0),
    ("spatial transcriptomics", 200.0),
)
"""Distance of spots in um for platforms whose name holds the text, the first that fits; inf where it is a choice."""
RESOLUTION_MARGIN = 0.1
"""Gain of fit (a share of variance) for another scale to be right: of 700 scales tried some fit better by chance."""
RESOLUTION_RANGE, RESOLUTION_MIN = 32.0, 1.15
"""Scales looked through, and the least that counts; hires pictures are 2 to 20 times smaller than full resolution."""
CORNER_MARGIN = 0.02
"""Gain of fit for a shift. On sound sections the best shift gains at most 0.005; half a spot's width loses 0.03 to 0.15."""
ORIENTATION_MARGIN = 0.05
"""Gain of fit for another orientation; on sound sections every other one loses 0.07 or more."""
HALF_TILES_UM = (56.0,)
"""Half of the tiles that others cut (112 um: 224 px at 0.5 um per px), beside half of ours and of a spot."""


def on_tissue(look: SectionContext) -> Finding:
    """Share of spots whose ground is tissue, told from glass by optical density."""
    off = np.flatnonzero(~look.on_tissue(look.xy))
    figure = 1 - len(off) / len(look.xy)
    return graded(
        "on_tissue",
        figure,
        ON_TISSUE_WARN,
        ON_TISSUE_FAIL,
        f"{figure:.1%} of {len(look.xy)} spots are on tissue",
        "look at the overlay: leave spots off tissue out (in_tissue = 0), or give positions in px of this image",
        spots=tuple(off.tolist()),
    )


def platform_pitch(platform: str) -> float:
    """Return the spot distance in um that a platform has, NaN where it is not known."""
    name = f" {platform.lower()} "
    for text, pitch in PITCH_OF_PLATFORM:
        if text in name:
            return pitch if isfinite(pitch) else float("nan")
    return float("nan")


def scale(look: SectionContext) -> Finding:
    """Spot spacing in um, by the stated um per px, against the platform's."""
    stated, known = look.section.meta.spot_pitch_um, platform_pitch(look.section.meta.platform)
    expected = stated if isfinite(stated) and stated > 0 else known
    if not isfinite(expected) or not isfinite(look.pitch_px):
        return not_applicable(
            "scale", "the distance of spots is not known" if not isfinite(expected) else "spots lie on no lattice"
        )
    measured = look.pitch_px * look.mpp
    error = max(measured / expected, expected / measured) - 1
    mpp = look.section.meta.mpp * expected / measured
    said = (
        f"spots are {measured:.1f} um apart by the stated {look.section.meta.mpp:.4g} um per px, {expected:g} expected"
    )
    if isfinite(known) and abs(known / expected - 1) > SCALE_WARN:
        said += f" ({look.section.meta.platform} has {known:g})"
        error = max(error, abs(known / expected - 1))
    return graded(
        "scale",
        error,
        SCALE_WARN,
        SCALE_FAIL,
        said,
        f"state --mpp {mpp:.4g} if the array's spacing is right, or the true spacing",
    )


def full_or_hires(look: SectionContext) -> Finding:
    """Whether positions are px of another size of this image: of full resolution or of the hires picture."""
    name = "full_or_hires"
    if not _suspicious(look):
        return Finding(
            name=name,
            status=OK,
            figure=1.0,
            threshold=RESOLUTION_MIN,
            said="positions spread over the picture as its tissue does, at the right distance",
        )
    if not look.can_fit:
        return not_applicable(name, "too few spots with counts to tell")
    best, fit = _best_scale(look)
    rival = max(look.as_given + RESOLUTION_MARGIN, best_turn(look)[2], best_shift(look)[1], look.chance(look.xy * best))
    if max(best, 1 / best) < RESOLUTION_MIN or fit < rival:
        said = f"no other scale of the positions fits clearly better (best {best:.3g}: {fit:.2f}, as given {look.as_given:.2f})"
        return Finding(name=name, status=OK, figure=1.0, threshold=RESOLUTION_MIN, said=said)
    near = [f"1 / {k}" for k, v in look.hires.items() if abs(best * v - 1) < 0.03]
    near += [k for k, v in look.hires.items() if abs(best / v - 1) < 0.03]
    said = (
        f"expression fits the picture with positions times {best:.4g}{f' ({near[0]})' if near else ''}: "
        f"{fit:.2f} of its variance explained, {look.as_given:.2f} as given"
    )
    return Finding(
        name=name,
        status=FAIL,
        figure=round(best, 4),
        threshold=RESOLUTION_MIN,
        said=said,
        advice="positions are px of another size of this image: give the image that they belong to (--image), or scale them",
    )


def _suspicious(look: SectionContext) -> bool:
    """Tell whether a search for another scale is worth its time: it costs a second and could find chance."""
    height, width = look.picture_HW3.shape[:2]
    right, low = look.xy.max(0)
    corner = right < 0.6 * width and low < 0.6 * height
    outside = (look.xy < -1).any() or right > width + 1 or low > height + 1
    return bool(corner or outside) or on_tissue(look).status != OK or scale(look).status != OK


def _best_scale(look: SectionContext) -> tuple[float, float]:
    """Return (factor on positions, its fit), by a grid of 1 % steps and finer ones round the best."""
    steps = int(np.log(RESOLUTION_RANGE) / 0.01)
    limits = np.array([look.picture_HW3.shape[1], look.picture_HW3.shape[0]]) * 1.05
    # Positions that would all lie in a few px, or beyond the picture, cannot be meant.
    low, high = look.xy.min(0), look.xy.max(0)
    factors = [
        f
        for f in np.exp(0.01 * np.arange(-steps, steps + 1))
        if (high * f <= limits).all() and ((high - low) * f).max() > 0.05 * limits.max()
    ] or [1.0]
    fits = np.array([look.fit(look.xy * f) for f in factors])
    fine = {
        f * g: look.fit(look.xy * f * g)
        for f in np.array(factors)[np.argsort(-fits, kind="stable")[:8]]
        for g in np.linspace(0.993, 1.007, 8)
    }
    best = max(fine, key=lambda f: fine[f])
    return float(best), fine[best]


def best_shift(look: SectionContext) -> tuple[tuple[float, float], float]:
    """Return the shift of all positions, um in x and y, that fits best, and its fit."""
    if "shift" not in look.memo:
        halves = sorted({look.spot_um / 2, look.tile_um / 2, *HALF_TILES_UM})
        tried = {
            (dx * half, dy * half): look.fit(look.xy + np.array([dx, dy]) * half / look.mpp)
            for half in halves
            if half >= look.mpp
            for dx in (-1, 0, 1)
            for dy in (-1, 0, 1)
            if dx or dy
        }
        look.memo["shift"] = max(tried.items(), key=lambda item: item[1])
    return look.memo["shift"]


def corner(look: SectionContext) -> Finding:
    """Whether positions are corners of tiles or spots, or lie beside their tissue, rather than centres."""
    name = "corner"
    if not look.can_fit:
        return not_applicable(name, "too few spots with counts to tell")
    (dx, dy), fit = best_shift(look)
    gain = fit - look.as_given
    said = f"shifted by ({dx:+.0f}, {dy:+.0f}) um: fit {fit:.2f}, as given {look.as_given:.2f}"
    if gain < CORNER_MARGIN or fit < look.chance(look.xy):
        said = f"no shift fits better (best {said})"
        return Finding(name=name, status=OK, figure=round(gain, 4), threshold=CORNER_MARGIN, said=said)
    advice = "positions do not lie where their tissue is: check the alignment of image and array"
    if dx == dy > 0:
        advice = f"positions are top-left corners: add half a tile's width ({dx:g} um) to x and y"
    return Finding(name=name, status=WARN, figure=round(gain, 4), threshold=CORNER_MARGIN, said=said, advice=advice)


_TURNS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "mirrored left to right": lambda u, v: (-u, v),
    "mirrored top to bottom": lambda u, v: (u, -v),
    "turned by 180 degrees": lambda u, v: (-u, -v),
    "with x and y swapped": lambda u, v: (v, u),
    "with x and y swapped, then mirrored left to right": lambda u, v: (-v, u),
    "with x and y swapped, then mirrored top to bottom": lambda u, v: (v, -u),
    "with x and y swapped, then turned by 180 degrees": lambda u, v: (-v, -u),
}


def best_turn(look: SectionContext) -> tuple[str, np.ndarray, float]:
    """Return the other orientation that fits best: what it is, positions, fit."""
    if "turn" not in look.memo:
        tried = [(what, xy, look.fit(xy)) for what, xy in turned(look)]
        look.memo["turn"] = max(tried, key=lambda item: item[2])
    return look.memo["turn"]


def orientation(look: SectionContext) -> Finding:
    """Whether expression fits the picture better with x and y swapped, mirrored or turned."""
    name = "orientation"
    if not look.can_fit:
        return not_applicable(name, "too few spots with counts to tell")
    best, xy, fit = best_turn(look)
    gain = fit - look.as_given
    chance = look.chance(xy if gain > 0 else look.xy)
    said = f"{best}: fit {fit:.2f}, as given {look.as_given:.2f}, by chance below {chance:.2f}"
    if max(fit, look.as_given) < chance:
        return not_applicable(name, f"expression fits the picture in no orientation, so none can be told (best {said})")
    if gain < ORIENTATION_MARGIN or best_shift(look)[1] >= fit:
        return Finding(
            name=name,
            status=OK,
            figure=round(gain, 4),
            threshold=ORIENTATION_MARGIN,
            said=f"no other orientation is clearly better (next {said})",
        )
    return Finding(
        name=name,
        status=FAIL,
        figure=round(gain, 4),
        threshold=ORIENTATION_MARGIN,
        said=f"positions fit {said}",
        advice="check which column is x (columns of the image) and y (rows), and whether the image was mirrored or turned",
    )


def turned(look: SectionContext) -> Iterator[tuple[str, np.ndarray]]:
    """Yield positions under the other seven symmetries, of the picture's frame and of the spots' own box."""
    height, width = look.picture_HW3.shape[:2]
    middle = np.array([width, height]) / 2
    box = (look.xy.min(0) + look.xy.max(0)) / 2
    for what, turn in _TURNS.items():
        # A picture that was turned by a quarter has exchanged its sides: positions came from a frame of H x W.
        frame = middle[::-1] if "swapped" in what else middle
        yield what, np.column_stack(turn(*(look.xy - frame).T)) + middle
        yield f"{what} (within the spots' own box)", np.column_stack(turn(*(look.xy - box).T)) + box
