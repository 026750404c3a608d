"""Spot pitch, and checks of the scale that use it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from comtip_shards.errors import SourceError

VISIUM_PITCH_UM, VISIUM_DIAMETER_UM = 100.0, 55.0
MAX_RATIO, MAX_RATIO_INFERRED = 1.15, 4.0
"""Maximum ratio between the spot pitch and that of Visium: if the platform is stated, and if it is inferred from the array."""
PITCH_UM = (0.1, 1000.0)
"""Range of the distance between spots, bins or cells on any platform: Stereo-seq has 0.5 um, legacy ST 200 um."""
_MIN_SPOTS = 7


def median_gap(xy: np.ndarray) -> float:
    """Return the median nearest-neighbour distance of positions, (n, 2), in their unit; NaN for fewer than two positions."""
    xy = xy[np.isfinite(xy).all(1)]
    if len(xy) < 2:
        return float("nan")
    # Equal positions share one leaf of the tree, in which each query takes as many steps as there are positions.
    distinct, counts = np.unique(xy, axis=0, return_counts=True)
    gaps = cKDTree(distinct).query(distinct, k=2)[0][:, 1] if len(distinct) > 1 else np.zeros(1)
    return float(np.median(np.repeat(np.where(counts > 1, 0.0, gaps), counts)))


def visium_mpp(xy: np.ndarray, where: str) -> float:
    """Return um per px of the positions of Visium spots, from their pitch of 100 um.

    Raises
    ------
    SourceError
        There are fewer than two positions, or most of them coincide.
    """
    gap = median_gap(xy)
    if not gap > 0:
        raise SourceError(
            f"{where}: the distance between spots is {gap:g} px, so the scale cannot be derived from the pitch of Visium; "
            "correct the positions, or set `mpp`"
        )
    return VISIUM_PITCH_UM / gap


def max_ratio(platform: str, obs: pd.DataFrame) -> float:
    """Return the limit for :func:`check_pitch`; infinite unless platform or array (``obs``) identify the spots as Visium."""
    if platform:
        return MAX_RATIO if platform.lower() == "visium" else float("inf")
    if not {"array_row", "array_col"} <= set(obs) or len(obs) < _MIN_SPOTS:
        return float("inf")
    row, col = (pd.to_numeric(obs[c].astype(str), errors="coerce").to_numpy() for c in ("array_row", "array_col"))
    known = np.isfinite(row).all() and np.isfinite(col).all()
    hexagonal = known and ((row + col) % 2 == 0).all() and np.ptp(col) > np.ptp(row)
    return MAX_RATIO_INFERRED if hexagonal else float("inf")


def check_pitch(xy: np.ndarray, mpp: float, limit: float, where: str) -> None:
    """Check that the spot pitch at this scale is possible, and on a Visium slide that it is 100 um.

    Parameters
    ----------
    xy
        float64 (n, 2), px.
    mpp
        um per px of the positions.
    limit
        Maximum ratio between the pitch and 100 um, see :func:`max_ratio`.
    where
        File name for messages.

    Raises
    ------
    SourceError
        The scale is not positive, is wrong (e.g. by a factor of ten), or belongs to another image.
    """
    if not np.isfinite(mpp) or mpp <= 0:
        raise SourceError(f"{where}: the scale is {mpp:g} um per px, expected a positive number; set `mpp`")
    gap = median_gap(xy)
    if len(xy) >= _MIN_SPOTS and gap > 0 and not PITCH_UM[0] <= gap * mpp <= PITCH_UM[1]:
        raise SourceError(
            f"{where}: with {mpp:g} um per px the spots are {gap * mpp:g} um apart, but those of every platform are {PITCH_UM[0]:g} to "
            f"{PITCH_UM[1]:g} um apart; correct `mpp`, the um per px of the positions"
        )
    if len(xy) < _MIN_SPOTS or not gap > 0 or 1 / limit <= gap * mpp / VISIUM_PITCH_UM <= limit:
        return
    raise SourceError(
        f"{where}: with {mpp:g} um per px the spot pitch is {gap * mpp:.1f} um, but on a Visium slide it is "
        f"{VISIUM_PITCH_UM:g} um; set `mpp` to {VISIUM_PITCH_UM / gap:.4g}, or `platform` if this is not a Visium slide"
    )
