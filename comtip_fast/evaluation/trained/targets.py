"""Expression targets of spots: centred within each section and scaled per gene, for the genes that the section measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

MIN_STD = 1e-6


@dataclass
class Targets:
    """Targets of N spots and G genes, in units of the standard deviation within sections.

    The level of a section is not learnt, because sections differ in level for technical reasons and the scores do not depend
    on the level. Ridge baselines are fitted in the same way.
    """

    keys: list[str]
    section_N: np.ndarray
    """int64, for each spot the row of its section in ``known_SG``."""
    values_NG: sparse.csr_matrix
    """log1p CP10K."""
    known_SG: np.ndarray
    """bool, whether a section measured a gene."""
    mean_SG: np.ndarray
    """Mean of each gene in each section."""
    level_G: np.ndarray
    """Mean of each gene over all spots that measured it, added to predictions; 0 if no spot measured it."""
    std_G: np.ndarray
    """Standard deviation within sections; 1 for a gene that does not vary."""

    @classmethod
    def of(
        cls, keys: Sequence[str], section_N: np.ndarray, values_NG: sparse.csr_matrix, known_SG: np.ndarray
    ) -> Targets:
        """Compute means and standard deviations; the parameters are fields of the class."""
        n_S = np.array([(section_N == s).sum() for s in range(len(known_SG))], np.float64)
        mean_SG, square_SG = np.zeros(known_SG.shape), np.zeros(known_SG.shape)
        for s in np.flatnonzero(n_S):
            own = values_NG[section_N == s].astype(np.float64)
            mean_SG[s] = np.asarray(own.mean(0)).ravel()
            square_SG[s] = np.asarray(own.multiply(own).mean(0)).ravel()
        weight_SG = known_SG * n_S[:, None]
        total_G = np.maximum(weight_SG.sum(0), 1.0)
        variance_G = (weight_SG * np.maximum(square_SG - mean_SG**2, 0.0)).sum(0) / total_G
        std_G = np.sqrt(variance_G)
        level_G = (weight_SG * mean_SG).sum(0) / total_G
        return cls(list(keys), section_N, values_NG, known_SG, mean_SG, level_G, np.where(std_G > MIN_STD, std_G, 1.0))

    @property
    def learnt_G(self) -> np.ndarray:
        """Mask, bool (G,), of the genes that at least one section with spots measured."""
        learnt: np.ndarray = self.known_SG[np.unique(self.section_N)].any(0)
        return learnt

    def of_spots(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the targets, float32 (n, G), 0 where unknown, and a mask of the known targets, bool (n, G)."""
        section = self.section_N[rows]
        known = self.known_SG[section]
        z = (self.values_NG[rows].toarray() - self.mean_SG[section]) / self.std_G
        return np.where(known, z, 0.0).astype(np.float32), known

    def expression(self, z_NG: np.ndarray) -> np.ndarray:
        """Return log1p CP10K of predicted targets, float64 (N, G); a gene that no section measured is constant."""
        out: np.ndarray = self.level_G + np.where(self.learnt_G, z_NG * self.std_G, 0.0)
        return out
