"""Spatial null distribution: predicted maps, rotated and shifted over the section.

Two smooth maps correlate by chance far more often than a permutation of spots suggests. Each draw mirrors the positions of
the spots with probability 1/2, rotates and shifts them at random, and assigns every spot the prediction of the spot that is
nearest to its moved position. This preserves the map's smoothness and approximately its values, but not its alignment with
the tissue.
"""

from __future__ import annotations

import numpy as np
from comtip_shards.sampling.rng import generator
from scipy.spatial import cKDTree

from comtip_fast.evaluation.metrics import covariate_basis, residuals_of_basis
from comtip_fast.metrics import EPSILON, pcc_per_gene

MAX_SHIFT = 0.5
"""Largest shift per axis, relative to the section's radius."""
MIN_ANGLE = np.pi / 4
"""Smallest rotation angle in radians; smaller angles hardly move the map."""
CHUNK = 128
"""Number of genes processed together, which bounds memory on large sections."""


def moved_spots(xy_N2: np.ndarray, n_draws: int, *, seed: int, section: str) -> np.ndarray:
    """Return, for each draw, the index of the spot that each spot takes its prediction from, int64 (n_draws, N)."""
    centred = np.asarray(xy_N2, np.float64) - np.mean(xy_N2, axis=0)
    radius = float(np.sqrt((centred**2).sum(1)).max()) or 1.0
    tree = cKDTree(centred)
    rng = generator(seed, "null", section)
    out = np.empty((n_draws, len(centred)), np.int64)
    for draw in range(n_draws):
        angle = rng.uniform(MIN_ANGLE, 2 * np.pi - MIN_ANGLE)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        if rng.random() < 0.5:
            rotation = rotation @ np.diag([1.0, -1.0])
        shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * radius
        out[draw] = tree.query(centred @ rotation.T + shift)[1]
    return out


def null_pcc(
    measured_NG: np.ndarray, predicted_NG: np.ndarray, moved_DN: np.ndarray, columns: np.ndarray | None = None
) -> np.ndarray:
    """Return the PCC of each of the genes ``columns`` (default: all) in every draw, float64 (n_draws, G); NaN where undefined.

    The result equals ``pcc_per_gene(measured, predicted[draw])`` for every draw, up to rounding, but is faster: the mean and the
    norm of a moved map follow from how often the draw uses each spot.
    """
    n, genes = measured_NG.shape
    columns = np.arange(genes) if columns is None else columns
    out = np.full((len(moved_DN), columns.size), np.nan)
    if not out.size:
        return out
    used_DN = np.stack([np.bincount(draw, minlength=n) for draw in moved_DN]).astype(np.float64)
    for start in range(0, columns.size, CHUNK):
        part = columns[start : start + CHUNK]
        a, b = np.asarray(measured_NG[:, part], np.float64), np.asarray(predicted_NG[:, part], np.float64)
        centred_a, centred_b = a - a.mean(0), b - b.mean(0)
        norm_a = np.sqrt((centred_a**2).sum(0))
        constant_a = norm_a <= EPSILON * np.sqrt((a * a).sum(0))
        constant_b = np.sqrt((centred_b**2).sum(0)) <= EPSILON * np.sqrt((b * b).sum(0))
        constant = constant_a | constant_b
        square_DG = used_DN @ centred_b**2
        variation_DG = square_DG - (used_DN @ centred_b) ** 2 / n
        # A draw that gives all spots the same value leaves the difference of two equal numbers.
        defined_DG = (variation_DG > 1e-12 * square_DG) & ~constant
        cross_DG = np.stack([np.einsum("ng,ng->g", centred_a, centred_b[draw]) for draw in moved_DN])
        norm_DG = np.sqrt(np.where(defined_DG, variation_DG, 1.0)) * np.where(constant, 1.0, norm_a)
        out[:, start : start + CHUNK] = np.where(defined_DG, cross_DG / norm_DG, np.nan)
    return out


def null_partial_pcc(
    measured_NG: np.ndarray, predicted_NG: np.ndarray, covariates_NC: np.ndarray, moved_DN: np.ndarray
) -> np.ndarray:
    """Return the partial PCC of every gene in every draw, float64 (n_draws, G); the covariates are not moved."""
    basis = covariate_basis(covariates_NC)
    residual = residuals_of_basis(measured_NG, basis)
    draws = [pcc_per_gene(residual, residuals_of_basis(predicted_NG[draw], basis)) for draw in moved_DN]
    return np.stack(draws) if draws else np.zeros((0, residual.shape[1]))
