"""Spot pitch, and checks of the scale that use it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf, isfinite, nan

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import SectionFacts
from comtip_shards.sections.section import Section
from comtip_shards.slides.open import mpp_by_tag
from comtip_shards.slides.pixel_scale import TENFOLD, check_side, check_stated_mpp

VISIUM_PITCH_UM, VISIUM_DIAMETER_UM = 100.0, 55.0
MAX_RATIO, MAX_RATIO_INFERRED = 1.15, 4.0
"""Maximum ratio between the spot pitch and that of Visium: if the platform is stated, and if it is inferred from the array."""
PITCH_UM = (0.1, 1000.0)
"""Range of the distance between spots, bins or cells on any platform: Stereo-seq has 0.5 um, legacy ST 200 um."""
_MIN_SPOTS = 7
_MANY_SPOTS = 50
"""From this number of spots on, some are neighbours in the array; fewer can be far apart in a correct section."""
DENSE_QUANTILE = 0.05
"""Quantile of nearest-neighbour distances that is compared with the pitch: where spots are left out, most distances are longer."""
PITCH_OF_PLATFORM = (
    ("visium hd", inf),
    ("visiumhd", inf),
    ("visium", 100.0),
    ("2k", 150.0),
    ("st", 200.0),
    ("spatial transcriptomics", 200.0),
)
"""(words, distance between spots in um): the first words that the platform's name contains apply; inf if the distance varies."""


def platform_pitch(platform: str) -> float:
    """Return the spot distance of a platform in um, NaN if it is not known."""
    name = f" {' '.join(re.findall(r'[a-z0-9]+', platform.lower()))} "
    for words, pitch in PITCH_OF_PLATFORM:
        if f" {words} " in name:
            return pitch if isfinite(pitch) else nan
    return nan


@dataclass(frozen=True)
class ScaleCheck:
    """Check of a section's scale against its pitch, its platform, and the scale and size of its image.

    Parameters
    ----------
    mpp
        The stated um per px of the positions; None if the scale is the source's own.
    trusted
        Whether the caller states that this scale is right.
    pitch_is_stated
        Whether the section's pitch is the source's own, not an assumption.
    factor
        px of the image per px of the positions in the source, to which ``mpp`` refers.
    """

    mpp: float | None
    trusted: bool
    pitch_is_stated: bool = True
    factor: float = 1.0

    @classmethod
    def of(cls, facts: SectionFacts, factor: float = 1.0) -> ScaleCheck:
        """Return the check for stated facts."""
        return cls(facts.mpp, bool(facts.trust_mpp), factor=factor)

    def __call__(self, section: Section) -> None:
        """Raise :class:`SourceError` if the scale contradicts the pitch or the image by a factor of :data:`TENFOLD` or more.

        Also if a stated scale makes the image larger than any slide, or if the pitch is known but all spots have the same position.
        Smaller differences between a stated scale and the scale of the image are logged.
        """
        meta, where = section.meta, f"section {section.meta.section_id}"
        if not self.trusted and self.pitch_is_stated:
            self._check_gaps(section, meta.spot_pitch_um, "the spot pitch of the section")
        if not self.trusted:
            self._check_gaps(section, platform_pitch(meta.platform), f"the spot pitch of {meta.platform}")
        if self.mpp is None:
            return
        check_side(section.image_size(), meta.mpp, where, trusted=self.trusted)
        if section.slide_opener is None:
            own = mpp_by_tag(section.image_path, [])
            check_stated_mpp(meta.mpp, own, section.image_path.name, where, trusted=self.trusted)

    def _check_gaps(self, section: Section, pitch_um: float, what: str) -> None:
        """Raise SourceError if the spots are at least :data:`TENFOLD` times too near or too far for a pitch, or at one position.

        Nothing is checked for an unknown pitch (NaN) or few spots.
        """
        if len(section.xy) < _MIN_SPOTS or not (isfinite(pitch_um) and pitch_um > 0):
            return
        where, distinct = f"section {section.meta.section_id}", np.unique(section.xy, axis=0)
        if len(distinct) < 2:
            raise SourceError(f"{where}: all {len(section.xy)} spots have the same position; correct the positions")
        gaps = cKDTree(distinct).query(distinct, k=2)[0][:, 1] * section.meta.mpp
        near, typical = float(np.quantile(gaps, DENSE_QUANTILE)), float(np.median(gaps))
        sparse = near >= TENFOLD * pitch_um
        if typical > pitch_um / TENFOLD and not (sparse and len(distinct) >= _MANY_SPOTS):
            return
        mpp = section.meta.mpp * self.factor
        fix = (
            f"correct the scale in the source or set `mpp`; if {mpp:g} is right, set `mpp={mpp:g}` and `trust_mpp=yes`"
            if self.mpp is None
            else "correct `mpp`, or set `trust_mpp=yes` if it is right"
        )
        raise SourceError(
            f"{where}: with {mpp:g} um per px of the positions the spots are {typical:.3g} um apart, but {what} is {pitch_um:g} um, "
            f"which gives {mpp * pitch_um / typical:.3g} um per px; {fix}"
        )


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
        problem = (
            "most spots have the same position as another one" if gap == 0 else "fewer than two spots have a position"
        )
        raise SourceError(
            f"{where}: {problem}, so the scale cannot be derived from the pitch of Visium; correct the positions, or set `mpp`"
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
        The scale is not positive, or gives a pitch outside :data:`PITCH_UM` or beyond the limit: it is wrong, or for another image.
    """
    if not np.isfinite(mpp) or mpp <= 0:
        raise SourceError(f"{where}: the scale is {mpp:g} um per px, expected a positive number; set `mpp`")
    gap = median_gap(xy)
    if len(xy) >= _MIN_SPOTS and gap > 0 and not PITCH_UM[0] <= gap * mpp <= PITCH_UM[1]:
        raise SourceError(
            f"{where}: with {mpp:g} um per px the spots are {gap * mpp:g} um apart, but those of every platform are {PITCH_UM[0]:g} to "
            f"{PITCH_UM[1]:g} um apart; set `mpp` to the um per px of the positions"
        )
    if len(xy) < _MIN_SPOTS or not gap > 0 or 1 / limit <= gap * mpp / VISIUM_PITCH_UM <= limit:
        return
    raise SourceError(
        f"{where}: with {mpp:g} um per px the spot pitch is {gap * mpp:.1f} um, but on a Visium slide it is "
        f"{VISIUM_PITCH_UM:g} um; set `mpp` to {VISIUM_PITCH_UM / gap:.4g}, or `platform` if this is not a Visium slide"
    )
