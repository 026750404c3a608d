"""Scores shared by training and evaluation."""

from __future__ import annotations

import numpy as np


def mean_pcc(measured_NG: np.ndarray, predicted_NG: np.ndarray) -> float:
    """Return the mean Pearson correlation over genes; a gene without variance on either side counts 0."""
    a, b = measured_NG - measured_NG.mean(0), predicted_NG - predicted_NG.mean(0)
    norm = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return float(np.where(norm > 1e-12, (a * b).sum(0) / np.maximum(norm, 1e-12), 0.0).mean())
