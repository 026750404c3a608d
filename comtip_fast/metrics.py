"""Metrics shared by training and evaluation: Pearson correlation (PCC) per gene, and conversion of numbers for JSON."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

GENES_AT_ONCE = 128
"""Number of genes that are correlated together, which bounds the memory beyond the two matrices."""
EPSILON = 1e-10
"""Relative spread below which a column counts as constant."""


def pcc_per_gene(measured_NG: np.ndarray, predicted_NG: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation over N spots for each of G genes.

    Returns
    -------
    ndarray
        float64 (G,); NaN where either side is constant.

    Raises
    ------
    ValueError
        The two shapes differ.
    """
    if measured_NG.shape != predicted_NG.shape:
        raise ValueError(
            f"pcc_per_gene: measured has shape {measured_NG.shape}, predicted {predicted_NG.shape}; pass equal shapes"
        )
    columns = [slice(i, i + GENES_AT_ONCE) for i in range(0, measured_NG.shape[1], GENES_AT_ONCE)]
    parts = [_pcc(measured_NG[:, part], predicted_NG[:, part]) for part in columns]
    return np.concatenate(parts) if parts else np.zeros(0)


def _pcc(measured_NG: np.ndarray, predicted_NG: np.ndarray) -> np.ndarray:
    """Return the PCC of each column, float64 (G,); NaN where either side is constant."""
    # One memory layout; otherwise the order of the sum, and so the last digit, depends on how columns were selected.
    a, b = np.ascontiguousarray(measured_NG, np.float64), np.ascontiguousarray(predicted_NG, np.float64)
    scale_a, scale_b = np.sqrt((a * a).sum(0)), np.sqrt((b * b).sum(0))
    a, b = a - a.mean(0), b - b.mean(0)
    norm_a, norm_b = np.sqrt((a * a).sum(0)), np.sqrt((b * b).sum(0))
    # A constant column is not exactly 0 after centring; its norm is rounding noise relative to its values.
    defined = (norm_a > EPSILON * scale_a) & (norm_b > EPSILON * scale_b)
    out = np.full(a.shape[1], np.nan)
    out[defined] = (a * b).sum(0)[defined] / (norm_a * norm_b)[defined]
    return out


def mean_with_zeros(pcc_G: np.ndarray) -> float | None:
    """Return the mean with undefined correlations counted as 0; None if there are no genes."""
    return float(np.nan_to_num(pcc_G).mean()) if pcc_G.size else None


def mean_pcc(measured_NG: np.ndarray, predicted_NG: np.ndarray) -> float:
    """Return the mean of :func:`pcc_per_gene`; an undefined correlation counts as 0. Without genes, the mean is NaN."""
    mean = mean_with_zeros(pcc_per_gene(measured_NG, predicted_NG))
    return math.nan if mean is None else mean


def finite_or_none(value: Any) -> Any:
    """Replace every float that is not finite by None, in nested dicts and lists: JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {k: finite_or_none(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite_or_none(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
