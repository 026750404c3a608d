"""Strata: groups of the genes of a section with similar detection rate and mean expression level.

Pair-aware adversarial training (``loss.paat``) needs negatives, in which genes have wrong levels. With ``loss.paat.mode`` ``strata``,
and with ``mixed`` for each spot with probability 0.5, a spot's levels are permuted among the genes of the same stratum.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def gene_strata(mean_level_SG: Tensor, detection_SG: Tensor, measured_SG: Tensor, n_strata: int) -> Tensor:
    """Assign each section's measured genes to strata of similar detection rate and mean level.

    Genes are ranked by detection rate plus relative mean level (mean level divided by its maximum over the section's genes), and
    the ranks are divided into ``n_strata`` equal parts. Unmeasured genes form one more stratum, so that no level moves between
    measured and unmeasured genes.

    Parameters
    ----------
    mean_level_SG, detection_SG
        Mean level and detection rate of G genes in S sections, float.
    measured_SG
        bool: whether the section measured the gene.
    n_strata
        Number of strata of measured genes.

    Returns
    -------
    Tensor
        int64 (S, G); unmeasured genes have the value ``n_strata``.
    """
    score = mean_level_SG / mean_level_SG.amax(1, keepdim=True).clamp_min(1e-9) + detection_SG
    score = score.masked_fill(~measured_SG, float("inf"))
    rank_SG = score.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    count_S1 = measured_SG.sum(1, keepdim=True).clamp_min(1)
    stratum = torch.div(rank_SG * n_strata, count_S1, rounding_mode="floor").clamp_max(n_strata - 1)
    return stratum.masked_fill(~measured_SG, n_strata)


def strata_from_levels(levels_NG: np.ndarray, section_N: np.ndarray, measured_SG: np.ndarray, n_strata: int) -> Tensor:
    """Return the strata of all sections, int64 (S, G), from the levels of N training spots; see :func:`gene_strata`."""
    S, G = measured_SG.shape
    mean, detection = np.zeros((S, G)), np.zeros((S, G))
    for s in np.unique(section_N):
        levels = levels_NG[section_N == s]
        mean[s], detection[s] = levels.mean(0), (levels > 0).mean(0)
    return gene_strata(torch.from_numpy(mean), torch.from_numpy(detection), torch.from_numpy(measured_SG), n_strata)
