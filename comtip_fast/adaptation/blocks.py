"""Split of a section into spatial blocks of spots for fitting, and test spots whose tiles share no pixel with theirs.

Neighbouring spots are similar, and tiles are often wider than the distance between spots. A random choice of spots would
test a model on what it was fitted to. Fit spots therefore form compact blocks, and test spots keep a margin from these blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from comtip_shards.sampling.rng import generator
from scipy.spatial import cKDTree

BLOCKS = 2
"""Number of blocks of fit spots."""
MIN_FIT, MIN_TEST = 10, 10
"""Smallest number of spots to fit on, and to test on."""
MIN_SPOTS = MIN_FIT + MIN_TEST
"""Smallest number of spots of a section; with fewer, no ``fraction`` leaves enough spots to fit on and to test on."""


@dataclass(frozen=True)
class BlockSplit:
    """Indices of the fit spots and test spots of a section; all other spots form the margin between them and are not used."""

    fit: np.ndarray
    """int64, ascending: spots to which a correction is fitted."""
    test: np.ndarray
    """int64, ascending: spots on which it is evaluated."""


def split_blocks(
    xy_um: np.ndarray, fraction: float, margin_um: float, *, seed: int, number: int, section: str
) -> BlockSplit:
    """Choose fit spots in compact blocks around random centres; test spots are all spots beyond a margin around the blocks.

    Parameters
    ----------
    xy_um
        Positions (N, 2) in um.
    fraction
        Share of the spots to fit on.
    margin_um
        Smallest distance between fit and test spots along x or y; if it is at least the width of a tile, no two tiles overlap.
    seed, number, section
        Seed, index of the split and id of the section, which define the centres.

    Raises
    ------
    ValueError
        There are too few spots to fit on or to test on.
    """
    xy = np.asarray(xy_um, np.float64)
    if len(xy) < MIN_SPOTS:
        raise ValueError(
            f"section {section}: {len(xy)} spots, but adaptation needs at least {MIN_SPOTS}, {MIN_FIT} to fit on and {MIN_TEST} to "
            "test on; give a larger section"
        )
    n_fit = max(1, round(fraction * len(xy)))
    if n_fit < MIN_FIT:
        raise ValueError(
            f"section {section}: {fraction:g} of {len(xy)} spots are {n_fit}, but adaptation needs at least {MIN_FIT}; give a "
            "larger `fraction`"
        )
    rng = generator(seed, "adapt blocks", section, number)
    chosen = np.zeros(len(xy), bool)
    for block in range(BLOCKS):
        free = np.flatnonzero(~chosen)
        size = n_fit * (block + 1) // BLOCKS - int(chosen.sum())
        centre = xy[free[int(rng.integers(free.size))]]
        nearest = np.argsort(((xy[free] - centre) ** 2).sum(1), kind="stable")[:size]
        chosen[free[nearest]] = True
    fit = np.flatnonzero(chosen)
    distance = cKDTree(xy[fit]).query(xy, p=np.inf)[0]
    test = np.flatnonzero(distance >= margin_um)
    if test.size < MIN_TEST:
        raise ValueError(
            f"section {section}: only {test.size} of {len(xy)} spots are at least {margin_um:g} um from the {fit.size} spots to "
            f"fit on, but a test needs {MIN_TEST}; give "
            + (f"a `fraction` below {fraction:g} or a larger section" if n_fit > MIN_FIT else "a larger section")
        )
    return BlockSplit(fit, test)
