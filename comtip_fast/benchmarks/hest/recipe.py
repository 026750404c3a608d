"""The regression of HEST-Benchmark on one fold, and variants of it.

The recipe: features are standardised and reduced to 256 principal components, both fitted on the training spots; ridge
regression without intercept predicts log1p of raw counts, with penalty 100 / (components x genes); the score is the mean
over genes of the Pearson correlation over all test spots of the fold. An undefined correlation makes the mean undefined.
Each variant changes one of these choices. Shapes: N spots, F features, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from comtip_fast.benchmarks.hest.variants import RECIPE, Variant
from comtip_fast.metrics import mean_pcc, pcc_per_gene

COMPONENTS, SEED, MAX_ITER = 256, 1, 1000
ALPHAS = tuple(10.0**k for k in range(-3, 7))
CV_FOLDS = 5


@dataclass(frozen=True)
class FoldData:
    """Spots of one half of a fold."""

    features_NF: np.ndarray
    raw_NG: np.ndarray
    """log1p of counts."""
    cp10k_NG: np.ndarray
    """log1p of counts per 10,000."""
    section_N: np.ndarray
    """int64, index of the section."""


@dataclass(frozen=True)
class FoldScore:
    """Scores of one fold under one variant."""

    pcc_G: np.ndarray
    """Correlation of each gene, NaN where undefined; for ``per_section``, the mean over the sections in which it is defined."""
    mean: float
    """Mean correlation; NaN if a correlation is undefined and the variant does not count it as 0."""
    n_undefined: int
    """Number of undefined correlations, over genes and (for ``per_section``) sections."""
    alpha: float
    n_components: int
    """Number of features of the regression: up to 256 components, fewer if the encoder or the fold has fewer; without PCA, all
    features."""


def score_fold(train: FoldData, test: FoldData, variant: Variant = RECIPE) -> FoldScore:
    """Fit the regression of ``variant`` on the training spots and score its predictions of the test spots."""
    x_train, x_test = (
        reduce(train.features_NF, test.features_NF) if variant.pca else (train.features_NF, test.features_NF)
    )
    y_train, y_test = (d.cp10k_NG if variant.cp10k else d.raw_NG for d in (train, test))
    alpha = 100 / (x_train.shape[1] * y_train.shape[1])
    if variant.cross_validated:
        alpha = best_alpha(x_train, y_train, train.section_N)
    predicted = fit_predict(x_train, y_train, x_test, alpha)
    pcc_SG = correlations(y_test, predicted, test.section_N if variant.per_section else np.zeros(len(y_test), np.int64))
    undefined = int(np.isnan(pcc_SG).sum())
    mean = float(np.nan_to_num(pcc_SG).mean()) if variant.undefined_as_zero else float(pcc_SG.mean())
    return FoldScore(_mean_defined(pcc_SG), mean, undefined, float(alpha), x_train.shape[1])


def reduce(train_NF: np.ndarray, test_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both feature matrices standardised and projected to principal components, fitted on the training spots, as float32.

    The benchmark converts the components to float32 before the regression.
    """
    scaler = StandardScaler().fit(train_NF)
    scaled = scaler.transform(train_NF)
    pca = PCA(min(COMPONENTS, *scaled.shape), random_state=SEED)
    return pca.fit_transform(scaled).astype(np.float32), pca.transform(scaler.transform(test_NF)).astype(np.float32)


def fit_predict(x_NF: np.ndarray, y_NG: np.ndarray, x_new_MF: np.ndarray, alpha: float) -> np.ndarray:
    """Return ridge predictions (M, G), fitted without intercept by the benchmark's solver."""
    model = Ridge(alpha=alpha, solver="lsqr", fit_intercept=False, max_iter=MAX_ITER, random_state=SEED)
    predicted: np.ndarray = model.fit(x_NF, y_NG).predict(x_new_MF)
    return predicted.reshape(len(x_new_MF), -1)


def best_alpha(x_NF: np.ndarray, y_NG: np.ndarray, section_N: np.ndarray) -> float:
    """Return the penalty of :data:`ALPHAS` with the highest mean correlation on training sections that are left out.

    With one training section, contiguous fifths of its spots are left out instead.
    """
    n = len(x_NF)
    fold_N = section_N if np.unique(section_N).size > 1 else np.arange(n) * CV_FOLDS // n
    total = np.zeros(len(ALPHAS))
    for fold in np.unique(fold_N):
        out = fold_N == fold
        left, singular, right = np.linalg.svd(x_NF[~out].astype(np.float64), full_matrices=False)
        scores, projected = x_NF[out] @ right.T, left.T @ y_NG[~out]
        for i, alpha in enumerate(ALPHAS):
            predicted = scores @ (projected * (singular / (singular**2 + alpha))[:, None])
            total[i] += mean_pcc(y_NG[out], predicted)
    return ALPHAS[int(total.argmax())]


def correlations(measured_NG: np.ndarray, predicted_NG: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """Return Pearson correlations (S, G) within each of S groups of spots; NaN where undefined."""
    return np.stack([pcc_per_gene(measured_NG[group_N == g], predicted_NG[group_N == g]) for g in np.unique(group_N)])


def _mean_defined(pcc_SG: np.ndarray) -> np.ndarray:
    defined = np.isfinite(pcc_SG)
    total = np.where(defined, pcc_SG, 0.0).sum(0)
    return np.where(defined.any(0), total / np.maximum(defined.sum(0), 1), np.nan)
