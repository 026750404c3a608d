"""Confidence intervals by a bootstrap over spatial blocks of one section, or over sections.

Neighbouring spots are alike, so intervals that resample single spots are too narrow. A section is cut into square blocks,
and whole blocks are drawn with replacement. Shapes: N spots, D draws, G genes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from comtip_shards.sampling.rng import generator

LEVEL = 0.95
BLOCKS_PER_SIDE = 5
MIN_BLOCKS = 5
"""A section with fewer blocks has no interval."""
Interval = tuple[float, float]
NO_INTERVAL: Interval = (float("nan"), float("nan"))


def spatial_blocks(xy_N2: np.ndarray, per_side: int = BLOCKS_PER_SIDE) -> np.ndarray:
    """Return the number, from 0, of each spot's block, int64 (N,); blocks are squares, ``per_side`` along the longer side."""
    xy = np.asarray(xy_N2, np.float64)
    low, span = xy.min(0), float(np.ptp(xy, axis=0).max()) or 1.0
    cell = np.minimum((xy - low) / span * per_side, per_side - 1).astype(np.int64)
    block: np.ndarray = np.unique(cell[:, 0] * per_side + cell[:, 1], return_inverse=True)[1]
    return block


def block_weights(block_N: np.ndarray, n_draws: int, *, seed: int, section: str) -> np.ndarray:
    """Return how often each draw uses each spot, float64 (D, N); D is 0 with fewer than :data:`MIN_BLOCKS` blocks."""
    n = int(block_N.max()) + 1
    if n < MIN_BLOCKS:
        return np.zeros((0, block_N.size))
    rng = generator(seed, "bootstrap", section)
    drawn = np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(n_draws)])
    return drawn[:, block_N].astype(np.float64)


def label_weights(
    xy_N2: np.ndarray, label_N: np.ndarray, n_draws: int, *, seed: int, section: str
) -> tuple[np.ndarray, int]:
    """Return :func:`block_weights` for scores of labelled spots, and the number of draws that are left out.

    Blocks are those of the labelled spots alone, so that every draw has some. A draw with fewer than two labels is left out,
    because agreement with a single label is 0 or 1 whatever the clusters are.
    """
    weights = block_weights(spatial_blocks(xy_N2), n_draws, seed=seed, section=section)
    _, code = np.unique(label_N, return_inverse=True)
    several = np.array([np.unique(code[w > 0]).size > 1 for w in weights], bool)
    return weights[several], int((~several).sum())


def interval(draws_D: np.ndarray) -> Interval:
    """Return the 95 % percentile interval of the draws; NaN without draws, or if a draw is not finite."""
    if draws_D.size == 0 or not np.isfinite(draws_D).all():
        return NO_INTERVAL
    low, high = np.quantile(draws_D, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_interval(values_N: np.ndarray, weights_DN: np.ndarray) -> Interval:
    """Return the interval of the mean over spots under the draws of :func:`block_weights`; NaN without draws."""
    if not len(weights_DN):
        return NO_INTERVAL
    return interval(weights_DN @ np.asarray(values_N, np.float64) / weights_DN.sum(1))


def weighted_pcc(a_NG: np.ndarray, b_NG: np.ndarray, weights_DN: np.ndarray) -> np.ndarray:
    """Return Pearson correlations with the spots weighted by each draw, float64 (D, G); 0 where undefined."""
    a, b = (np.asarray(v, np.float64) - np.mean(v, axis=0) for v in (a_NG, b_NG))
    w = weights_DN / weights_DN.sum(1, keepdims=True)
    mean_a, mean_b = w @ a, w @ b
    variance_a, variance_b = w @ a**2 - mean_a**2, w @ b**2 - mean_b**2
    scale = a.var(0) * b.var(0)
    product = variance_a * variance_b
    defined = (product > 1e-12 * np.maximum(scale, 1e-300)) & (scale > 0)
    out: np.ndarray = np.where(defined, (w @ (a * b) - mean_a * mean_b) / np.sqrt(np.where(defined, product, 1.0)), 0.0)
    return out


def resampled(statistic: Callable[[np.ndarray], float], weights_DN: np.ndarray, value: float | None = None) -> Interval:
    """Return the bootstrap interval of a statistic.

    Parameters
    ----------
    statistic
        Called with the indices of the drawn spots, with repeats.
    weights_DN
        From :func:`block_weights`.
    value
        If given, the draws are shifted so that their mean is this value, the statistic of all spots. The draws of a statistic of pairs
        are too high: copies of a spot are always in the same cluster and have the same label.
    """
    index = np.arange(weights_DN.shape[1])
    draws = np.array([statistic(np.repeat(index, w.astype(np.int64))) for w in weights_DN])
    return interval(draws if value is None or not draws.size else draws - draws.mean() + value)


def section_interval(values_S: np.ndarray, n_draws: int, *, seed: int) -> Interval:
    """Return the interval of a mean over sections, which are drawn with replacement; NaN with fewer than two sections.

    With few sections the interval is too narrow.
    """
    values = np.asarray(values_S, np.float64)
    if values.size < 2:
        return NO_INTERVAL
    rng = generator(seed, "bootstrap", "sections")
    return interval(values[rng.integers(0, values.size, (n_draws, values.size))].mean(1))
