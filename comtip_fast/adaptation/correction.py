"""A closed-form correction of the linear readout, fitted to some spots of a section.

The model's prediction stays, and ridge regression of its residuals on the frozen encoder's features is added. With a strong
penalty the correction vanishes, so few spots change the model little. The sum is again a linear readout, which an export holds.

Shapes: N spots, F features, G genes, K programmes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from comtip_fast.metrics import mean_pcc
from comtip_fast.models.readout import NORMS, CohortHead, LinearReadout, NormHead
from comtip_fast.training.readout.solve import RidgePath, SectionTable

ALPHAS = (1.0, 10.0, 100.0, 1000.0)
PROGRAMMES = (5, 20, 0)
"""Candidates for the ridge penalty per spot and the number of programmes (0: as many as genes)."""
GAIN = 0.005
"""Smallest gain in cross-validated mean PCC for which a correction is used."""


@dataclass(frozen=True)
class Correction:
    """A correction of one normalisation, and how it was chosen."""

    block: str
    head: NormHead
    facts: dict[str, Any]

    def predict(self, x_NF: np.ndarray) -> np.ndarray:
        """Return the correction (N, G) from the standardised features of the block."""
        h = self.head
        out: np.ndarray = h.mean_G + h.std_G * (h.scores(x_NF) @ h.loading_KG)
        return out


def fit_correction(
    x: dict[str, np.ndarray], measured_NG: np.ndarray, predicted_NG: np.ndarray, fold_N: np.ndarray, genes: np.ndarray
) -> Correction | None:
    """Fit a correction to N spots.

    Parameters
    ----------
    x
        Standardised features (N, F) by block.
    measured_NG, predicted_NG
        Measured expression, and the prediction to correct.
    fold_N
        Spatial fold of each spot. Block, penalty and number of programmes are those with the highest mean PCC of
        predictions for the fold that was left out.
    genes
        Columns whose mean PCC is compared.

    Returns
    -------
    Correction or None
        None if no candidate exceeds the uncorrected prediction by :data:`GAIN`.
    """
    residual = np.asarray(measured_NG, np.float64) - predicted_NG
    before = mean_pcc(measured_NG[:, genes], predicted_NG[:, genes])
    scores: dict[tuple[str, int, float], float] = {}
    for block, features in x.items():
        left_out = {(K, a): np.array(predicted_NG, np.float64) for K in PROGRAMMES for a in ALPHAS}
        for fold in np.unique(fold_N):
            fit, held = fold_N != fold, fold_N == fold
            path = _path(features[fit], residual[fit])
            for (K, alpha), corrected in left_out.items():
                corrected[held] += Correction(block, path.fit(K, alpha), {}).predict(features[held])
        for (K, alpha), corrected in left_out.items():
            scores[block, K, alpha] = mean_pcc(measured_NG[:, genes], corrected[:, genes])
    block, K, alpha = max(scores, key=lambda c: scores[c])
    best = scores[block, K, alpha]
    if not best > before + GAIN:
        return None
    facts = {"block": block, "programmes": K, "alpha": alpha, "cv_before": before, "cv_after": best}
    return Correction(block, _path(x[block], residual).fit(K, alpha), facts)


def _path(x_NF: np.ndarray, residual_NG: np.ndarray) -> RidgePath:
    table = SectionTable(x_NF, {"correction": residual_NG}, np.ones(residual_NG.shape[1], bool))
    return RidgePath([table], "correction")


def base_head(readout: LinearReadout, cohort: str, species: str) -> CohortHead:
    """Return one head that predicts as the readout does for a cohort: the cohort's own, or the mean over all heads of the species.

    Every block has a positive weight, so that it can be corrected; a block without weight before has loadings of 0.

    Raises
    ------
    ValueError
        No head has genes of the species.
    """
    own = [h for h in readout.heads if h.cohort == cohort]
    heads = own or [h for h in readout.heads if any(k.startswith(f"{species}:") for k in h.keys)]
    if not heads:
        raise ValueError(f"the model has no trained genes of species {species}; adapt a model that was trained on it")
    keys = list(dict.fromkeys(k for h in heads for k in h.keys if k.startswith(f"{species}:")))
    levels = float(np.mean([h.mix.get("levels", 0.0) for h in heads]))
    names = list(heads[0].blocks)
    known = np.array([[k in set(h.keys) for k in keys] for h in heads])
    share = known / known.sum(0)
    blocks = {b: {norm: _merged(heads, b, norm, keys, share, 1 / len(names)) for norm in NORMS} for b in names}
    mix = dict.fromkeys(names, (1 - levels) / len(names)) | {"levels": levels}
    mean_F, std_F = (np.mean([getattr(h, name) for h in heads], axis=0) for name in ("mean_F", "std_F"))
    return CohortHead(cohort, keys, mean_F, std_F, blocks, mix, dict(own[0].facts) if own else {})


def _merged(
    heads: list[CohortHead], block: str, norm: str, keys: list[str], share_HG: np.ndarray, weight: float
) -> NormHead:
    """Return the share-weighted sum of the heads' blocks, divided by the block's ``weight`` in the mixture."""
    mean, std = np.zeros(len(keys)), np.zeros(len(keys))
    weights, loadings = [], []
    for head, share in zip(heads, share_HG, strict=True):
        index = {k: i for i, k in enumerate(head.keys)}
        row, at = np.array([index.get(k, 0) for k in keys]), share > 0
        part, factor = head.blocks[block][norm], share * head.linear_mix()[block] / weight
        mean += factor * np.where(at, part.mean_G[row], 0)
        std += share * np.where(at, part.std_G[row], 0)
        weights.append(part.weight_FK)
        loadings.append(factor * np.where(at, part.std_G[row] * part.loading_KG[:, row], 0))
    std = np.where(std > 1e-9, std, 1.0)
    return NormHead(np.concatenate(weights, axis=1), np.concatenate(loadings) / std, mean, std)


def corrected_head(base: CohortHead, columns: np.ndarray, corrections: dict[str, Correction | None]) -> CohortHead:
    """Add corrections to a head.

    Parameters
    ----------
    base
        From :func:`base_head`.
    columns
        Indices into ``base.keys`` of the corrected genes.
    corrections
        Correction by normalisation; None leaves it as it is.
    """
    blocks = {name: dict(norms) for name, norms in base.blocks.items()}
    for norm, correction in corrections.items():
        if correction is None:
            continue
        old, new, scale = blocks[correction.block][norm], correction.head, base.mix[correction.block]
        mean, loading = old.mean_G.copy(), np.zeros((new.loading_KG.shape[0], len(base.keys)))
        mean[columns] += new.mean_G / scale
        loading[:, columns] = new.std_G * new.loading_KG / (scale * old.std_G[columns])
        weight = np.concatenate([old.weight_FK, new.weight_FK], axis=1)
        joined = NormHead(weight, np.concatenate([old.loading_KG, loading]), mean, old.std_G)
        blocks[correction.block][norm] = joined
    return replace(base, blocks=blocks)


def with_head(readout: LinearReadout, head: CohortHead) -> LinearReadout:
    """Return the readout with the head of its cohort added or replaced."""
    return LinearReadout(readout.settings, [*(h for h in readout.heads if h.cohort != head.cohort), head])
