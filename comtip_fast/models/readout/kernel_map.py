"""Feature maps of the readout: kernels between a tile's features and those of training spots, and the features themselves.

A head that is linear in the values k(x, l_1) ... k(x, l_M) of a kernel is kernel ridge regression. With the Matern kernel of order
3/2, k(x, l) = (1 + r) exp(-r) with r = sqrt(3) |x - l| / length (Rasmussen and Williams, Gaussian Processes for Machine Learning,
2006, equation 4.17), a prediction far from all training spots is the mean expression, whereas a linear function extrapolates.

Shapes: N spots, F features, P principal components, M landmarks, K programmes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import linalg

MAX_LANDMARKS = 2000
MAX_COMPONENTS = 256
JITTER = 1e-6
"""Added to the diagonal of the landmarks' kernel, which is singular if two spots have the same features."""


@dataclass
class KernelMap:
    """A Matern kernel between features and landmarks, which are training spots."""

    basis_FP: np.ndarray
    """Principal components of the features, multiplied by the features' weights."""
    landmark_MP: np.ndarray
    """Landmarks, as coordinates on the components."""
    length_1: np.ndarray
    """Length of the kernel: the median distance of landmarks."""

    @classmethod
    def fit(cls, x_NF: np.ndarray, scale_F: np.ndarray) -> KernelMap:
        """Choose landmarks and components for N standardised features whose weights are ``scale_F``; expression is not used.

        Up to :data:`MAX_LANDMARKS` spots all are landmarks; of more, spots at equal steps. At most :data:`MAX_COMPONENTS` components
        are those of the landmarks. Values are rounded to float32, as an export stores them.
        """
        chosen = np.unique(np.linspace(0, len(x_NF) - 1, min(len(x_NF), MAX_LANDMARKS)).round().astype(np.int64))
        own = x_NF[chosen] * scale_F
        wide = own.shape[0] < own.shape[1]
        gram = (own @ own.T if wide else own.T @ own).astype(np.float64)
        power, vectors = np.linalg.eigh(gram)
        kept = np.flatnonzero(power > 1e-6 * max(power[-1], 1e-12))[::-1][:MAX_COMPONENTS]
        basis = own.T @ (vectors[:, kept] / np.sqrt(power[kept])) if wide else vectors[:, kept]
        if not kept.size:  # all features are constant: one component of 0, because an export has no empty arrays
            basis = np.zeros((len(scale_F), 1))
        basis_FP = (scale_F[:, None] * basis).astype(np.float32)
        landmark_MP = (x_NF[chosen] @ basis_FP).astype(np.float32)
        distance = np.sqrt(_squared_distance(landmark_MP, landmark_MP))
        apart = distance[distance > 1e-6 * max(distance.max(initial=0.0), 1e-12)]
        return cls(basis_FP, landmark_MP, np.array([np.median(apart) if apart.size else 1.0], np.float32))

    def __call__(self, x_NF: np.ndarray) -> np.ndarray:
        """Return the values of the kernel between N spots and the landmarks, float64 (N, M)."""
        return self._values(x_NF @ self.basis_FP)

    def whitening(self) -> np.ndarray:
        """Return W, float64 (M, M), with W^T k W = 1 for the values k of the kernel between the landmarks.

        Ridge regression on ``self(x) @ W`` is kernel ridge regression: the penalty on its weights w is that of the function, and
        ``W @ w`` are the weights of the kernel's values. With fewer landmarks than spots, it is the subset-of-regressors approximation.
        """
        values = self._values(self.landmark_MP)
        values[np.diag_indices_from(values)] += JITTER
        lower = np.linalg.cholesky(values)
        inverse: np.ndarray = linalg.solve_triangular(lower, np.eye(len(lower)), lower=True)
        return inverse.T

    def _values(self, at_NP: np.ndarray) -> np.ndarray:
        # In two arrays, because each has 320 MB with 20,000 spots and 2,000 landmarks.
        r = _squared_distance(at_NP, self.landmark_MP)
        np.sqrt(r, out=r)
        r *= np.sqrt(3) / float(self.length_1[0])
        values: np.ndarray = np.negative(r)
        np.exp(values, out=values)
        r += 1
        values *= r
        return values

    def equals(self, other: KernelMap) -> bool:
        """Return whether another kernel has the same values everywhere, because all its arrays are equal."""
        return self is other or all(np.array_equal(a, vars(other)[name]) for name, a in vars(self).items())


@dataclass
class FeatureMap:
    """What the weights of a head multiply: the values of kernels and, if ``linear``, the features of its block."""

    kernels: list[KernelMap] = field(default_factory=list)
    linear: bool = True

    def __call__(self, x_NF: np.ndarray) -> np.ndarray:
        """Return the mapped features of N spots: the kernels' values in their order, then the features."""
        if not self.kernels:
            return x_NF
        return np.concatenate([*(k(x_NF) for k in self.kernels), *([x_NF] if self.linear else [])], axis=1)

    @property
    def n_kernel_values(self) -> int:
        """Number of mapped features that are values of a kernel."""
        return sum(len(k.landmark_MP) for k in self.kernels)


def join(maps: Sequence[FeatureMap], weights: Sequence[np.ndarray]) -> tuple[FeatureMap, np.ndarray]:
    """Join heads on the same features. A kernel that several heads have, as heads that were merged before, is kept once.

    Parameters
    ----------
    maps, weights
        Feature maps, and weights of the mapped features (M_i, K_i), one of each per head.

    Returns
    -------
    joined, weight
        A map with the features of all, and weights (M, sum of K_i) with which the programmes of all heads follow each other.
    """
    kernels: list[KernelMap] = []
    for kernel in (k for m in maps for k in m.kernels):
        if not any(kernel.equals(known) for known in kernels):
            kernels.append(kernel)
    ends = np.cumsum([0, *(len(k.landmark_MP) for k in kernels)])
    joined = FeatureMap(kernels, any(m.linear for m in maps))
    n_features = max(len(w) - m.n_kernel_values for m, w in zip(maps, weights, strict=True))
    out = np.zeros((joined.n_kernel_values + n_features, sum(w.shape[1] for w in weights)))
    column = 0
    for own, weight in zip(maps, weights, strict=True):
        n, programmes = 0, slice(column, column + weight.shape[1])
        for kernel in own.kernels:
            at = ends[next(i for i, known in enumerate(kernels) if kernel.equals(known))]
            size = len(kernel.landmark_MP)
            out[at : at + size, programmes] += weight[n : n + size]
            n += size
        if own.linear:
            out[joined.n_kernel_values :, programmes] = weight[n:]
        column = programmes.stop
    return joined, out


def _squared_distance(a_NP: np.ndarray, b_MP: np.ndarray) -> np.ndarray:
    """Return squared distances, float64 (N, M)."""
    a, b = a_NP.astype(np.float64), b_MP.astype(np.float64)
    out: np.ndarray = a @ b.T
    out *= -2
    out += np.square(a).sum(1)[:, None]
    out += np.square(b).sum(1)
    np.maximum(out, 0.0, out=out)
    return out
