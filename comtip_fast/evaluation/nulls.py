"""A null that keeps spatial structure: the predicted maps, turned and shifted on the section.

Two smooth maps correlate by chance far more often than shuffled spots would say. So each draw turns the predicted
map by a random angle, mirrors it or not, shifts it, and gives every spot the prediction of the spot that now lies
nearest. The map keeps its smoothness and nearly its values; only its place is wrong.
"""

from __future__ import annotations

import numpy as np
from comtip_shards.sampling.rng import generator
from scipy.spatial import cKDTree

from comtip_fast.evaluation.metrics import EPSILON, covariate_basis, outside, pcc_per_gene

MAX_SHIFT = 0.5
"""Largest shift, as a share of the section's radius."""
MIN_TURN = np.pi / 4
"""Draws that hardly move the map would be no null."""
BLOCK = 128
"""Genes moved at a time, so that a large section needs little memory."""


def moved_spots(xy_N2: np.ndarray, n_draws: int, *, seed: int, section: str) -> np.ndarray:
    """Return, for each draw, which spot's prediction every spot gets: int64 (n_draws, N)."""
    centred = np.asarray(xy_N2, np.float64) - np.mean(xy_N2, axis=0)
    radius = float(np.sqrt((centred**2).sum(1)).max()) or 1.0
    tree = cKDTree(centred)
    rng = generator(seed, "null", section)
    out = np.empty((n_draws, len(centred)), np.int64)
    for draw in range(n_draws):
        angle = rng.uniform(MIN_TURN, 2 * np.pi - MIN_TURN)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        if rng.random() < 0.5:
            turn = turn @ np.diag([1.0, -1.0])
        shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * radius
        out[draw] = tree.query(centred @ turn.T + shift)[1]
    return out


def null_pcc(measured_NG: np.ndarray, predicted_NG: np.ndarray, moved_DN: np.ndarray) -> np.ndarray:
    """Return the PCC of every gene under every draw, float64 (n_draws, G); NaN where undefined.

    The same numbers as ``pcc_per_gene(measured, predicted[draw])``, without centring and squaring the moved map
    anew: how often a draw uses each spot gives its mean and its norm.
    """
    measured, predicted = np.asarray(measured_NG, np.float64), np.asarray(predicted_NG, np.float64)
    n, genes = measured.shape
    out = np.full((len(moved_DN), genes), np.nan)
    if not out.size:
        return out
    used_DN = np.stack([np.bincount(draw, minlength=n) for draw in moved_DN]).astype(np.float64)
    for start in range(0, genes, BLOCK):
        a, b = measured[:, start : start + BLOCK], predicted[:, start : start + BLOCK]
        centred_a, centred_b = a - a.mean(0), b - b.mean(0)
        norm_a = np.sqrt((centred_a**2).sum(0))
        flat = (norm_a <= EPSILON * np.sqrt((a * a).sum(0))) | (
            np.sqrt((centred_b**2).sum(0)) <= EPSILON * np.sqrt((b * b).sum(0))
        )
        square_DG = used_DN @ centred_b**2
        spread_DG = square_DG - (used_DN @ centred_b) ** 2 / n
        # A draw that puts one spot's value everywhere leaves a difference of equal numbers.
        defined_DG = (spread_DG > 1e-12 * square_DG) & ~flat
        cross_DG = np.stack([np.einsum("ng,ng->g", centred_a, centred_b[draw]) for draw in moved_DN])
        norm_DG = np.sqrt(np.where(defined_DG, spread_DG, 1.0)) * np.where(flat, 1.0, norm_a)
        out[:, start : start + BLOCK] = np.where(defined_DG, cross_DG / norm_DG, np.nan)
    return out


def null_partial_pcc(
    measured_NG: np.ndarray, predicted_NG: np.ndarray, covariates_NC: np.ndarray, moved_DN: np.ndarray
) -> np.ndarray:
    """Return the partial PCC of every gene under every draw, float64 (n_draws, G): the covariates stay in place."""
    basis = covariate_basis(covariates_NC)
    left = outside(measured_NG, basis)
    draws = [pcc_per_gene(left, outside(predicted_NG[draw], basis)) for draw in moved_DN]
    return np.stack(draws) if draws else np.zeros((0, left.shape[1]))
