"""Spatial domains: clusters of spot features compared with labels. Shapes: N spots, F features."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

UNLABELLED = frozenset({"", "nan", "na", "none", "unknown", "undetermined", "unlabelled", "unassigned"})
"""Labels, in lower case, of spots that are left out."""
COMPONENTS, STARTS = 20, 10
SCORES = {"ari": adjusted_rand_score, "nmi": normalized_mutual_info_score}


def is_labelled(labels: np.ndarray) -> np.ndarray:
    """Return a mask of the spots with a label, bool (N,)."""
    return np.array([str(v).strip().lower() not in UNLABELLED for v in labels], bool)


def cluster(features_NF: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    """Return the k-means cluster of each spot, int64 (N,), from at most 20 principal components of the standardised features."""
    x = np.asarray(features_NF, np.float64)
    std = x.std(0)
    x = (x - x.mean(0)) / np.where(std > 1e-12, std, 1.0)
    k = min(COMPONENTS, *x.shape)
    if k < x.shape[1]:
        x = PCA(k, random_state=seed).fit_transform(x)
    found: np.ndarray = KMeans(n_clusters, n_init=STARTS, random_state=seed).fit_predict(x)
    return found.astype(np.int64)


def agreement(labels: np.ndarray, clusters_N: np.ndarray) -> dict[str, float]:
    """Return the adjusted Rand index (``ari``) and the normalised mutual information (``nmi``) of labels and clusters."""
    return {name: float(score(labels, clusters_N)) for name, score in SCORES.items()}
