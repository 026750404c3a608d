"""Scale of a Visium HD section, from the scale factors or from the pitch of the bins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.sources.files.table_batches import all_numbers, batches
from comtip_shards.sources.visium_hd_parts.files import FACTORS


def scale_of(factors: Mapping[str, float], path: Path, stated: float | None) -> float:
    """Return um per full-resolution px from the scale factors or the stated scale, which must agree if both are given.

    Raises
    ------
    SourceError
        There is no scale, or it contradicts the stated one or the width of the bins; the message names ``path``.
    """
    own = factors.get("microns_per_pixel", 0.0)
    mpp = own if own > 0 else stated
    if mpp is None:
        raise SourceError(
            f"{path}: microns_per_pixel is missing or not a positive number; set `mpp`, the um per px of the full-resolution image"
        )
    width, diameter = factors.get("bin_size_um"), factors.get("spot_diameter_fullres")
    if width and diameter and not 0.95 < diameter * mpp / width < 1.05:
        raise SourceError(
            f"{path}: bins of {width:g} um are {diameter:.3f} px wide, which gives {width / diameter:.4f} um per px instead of "
            f"{mpp:g}; {'copy the file from the Space Ranger output again' if own > 0 else 'correct `mpp`'}"
        )
    if stated is not None and not 0.95 < stated / mpp < 1.05:
        raise SourceError(f"{path}: states {mpp:g} um per full-resolution px, but `mpp` is {stated:g}; omit `mpp`")
    return mpp


def scale_or_pitch(
    factors: Mapping[str, float], table: Path, width: float, stated: float | None
) -> tuple[float, list[str]]:
    """Return (um per full-resolution px, notes).

    The scale is that of :func:`scale_of`; without scale factors, it is the stated one, or else derived from the pitch of the bins.

    Parameters
    ----------
    factors
        Scale factors, empty if the file is missing.
    table
        Table of positions.
    width
        Width of a bin in um.
    stated
        The stated scale, or None.

    Raises
    ------
    SourceError
        There is no scale, or it contradicts the stated one or the bins.
    """
    if factors:
        return scale_of(factors, table.parent / FACTORS, stated), []
    mpp = width / _pitch_px(table)
    if stated is not None and not 0.95 < stated / mpp < 1.05:
        raise SourceError(
            f"{table}: bins of {width:g} um with this pitch give {mpp:.4f} um per full-resolution px, but `mpp` is {stated:g}; "
            "omit `mpp`"
        )
    if stated is not None:
        return stated, [
            f"no {FACTORS}; scale: {stated:g} um per full-resolution px, as stated; the pitch of bins gives {mpp:.4f}"
        ]
    return mpp, [f"no {FACTORS}; scale: {mpp:.4f} um per full-resolution px, from the pitch of bins of {width:g} um"]


def _pitch_px(table: Path) -> float:
    """Return the distance between neighbouring bins in px, from a least-squares fit of positions to rows and columns."""
    gram, moment, n = np.zeros((3, 3)), np.zeros((3, 2)), 0
    for batch in batches(table, ["array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]):
        rc = all_numbers(batch, ["array_col", "array_row"], table)
        xy = all_numbers(batch, ["pxl_col_in_fullres", "pxl_row_in_fullres"], table)
        design = np.column_stack([rc, np.ones(len(rc))])
        gram, moment, n = gram + design.T @ design, moment + design.T @ xy, n + len(rc)
    if n < 3 or np.linalg.matrix_rank(gram) < 3:
        raise SourceError(f"{table}: too few bins to estimate the scale; copy {FACTORS} from the Space Ranger output")
    pitch = float(np.sqrt(abs(np.linalg.det(np.linalg.solve(gram, moment)[:2]))))
    if not pitch > 0:
        raise SourceError(
            f"{table}: the bins are on one line of the image; copy the table from the Space Ranger output again"
        )
    return pitch
