"""A closed-form correction of the readout, fitted to some spots of a section.

The model's prediction is kept, and a ridge regression of its residuals on the frozen encoder's features is added to it. With a
strong penalty, the correction approaches a constant per gene, the mean residual, so that a small number of spots changes the
predicted pattern only slightly. The sum is again a readout, which an export can store.

Shapes: N spots, F features, G genes, K programmes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from comtip_fast.export_checks.readout import MOST_KERNELS
from comtip_fast.metrics import mean_pcc
from comtip_fast.models.readout.heads import NORMS, CohortHead, NormHead, Readout
from comtip_fast.models.readout.kernel_map import FeatureMap, join
from comtip_fast.training.readout.solve import RidgePath, SectionTable

ALPHAS = (1.0, 10.0, 100.0, 1000.0)
PROGRAMMES = (5, 20, 0)
"""Candidates: ``ALPHAS`` for the ridge penalty per spot, ``PROGRAMMES`` for the number of programmes (0: as many as genes)."""
GAIN = 0.005
"""A correction is used only if its cross-validated gain in mean PCC exceeds this value."""


@dataclass(frozen=True)
class Correction:
    """A correction of one normalisation, and how it was chosen."""

    block: str
    """Name of the readout's block of features."""
    head: NormHead
    """Linear head from the block's features to the residuals of the prediction."""
    facts: dict[str, Any]
    """Block, penalty, number of programmes and cross-validated gains."""

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
        Measured expression, log1p, and the prediction to correct.
    fold_N
        Spatial fold of each spot. Candidates for block, penalty and number of programmes are compared by the gain in mean
        PCC within the fold that was left out, averaged over folds. With a small number of spots, a weak penalty may have the
        highest gain by chance. Therefore the strongest penalty with a gain within one standard error of the highest gain is used
        (one-standard-error rule).
    genes
        Columns over which the mean PCC is computed.

    Returns
    -------
    Correction or None
        None if no candidate gains more than :data:`GAIN`.
    """
    residual = np.asarray(measured_NG, np.float64) - predicted_NG
    gains: dict[tuple[str, int, float], list[float]] = {}
    for fold in np.unique(fold_N):
        fit, held = fold_N != fold, fold_N == fold
        measured = measured_NG[held][:, genes]
        before = mean_pcc(measured, predicted_NG[held][:, genes])
        for block, features in x.items():
            path = _path(features[fit], residual[fit])
            for K, alpha in product(PROGRAMMES, ALPHAS):
                # Scored within a fold, because the offset of a correction differs between folds.
                added = Correction(block, path.fit(K, alpha), {}).predict(features[held])[:, genes]
                gain = mean_pcc(measured, predicted_NG[held][:, genes] + added) - before
                gains.setdefault((block, K, alpha), []).append(gain)
    mean = {c: float(np.mean(g)) for c, g in gains.items()}
    best = max(mean, key=lambda c: mean[c])
    error = float(np.std(gains[best], ddof=1) / np.sqrt(len(gains[best]))) if len(gains[best]) > 1 else 0.0
    allowed = [c for c, gain in mean.items() if gain >= mean[best] - error and gain > GAIN]
    if not allowed:
        return None
    block, K, alpha = max(allowed, key=lambda c: (c[2], mean[c]))
    facts = {
        "block": block,
        "programmes": K,
        "alpha": alpha,
        "cv_gain": mean[block, K, alpha],
        "cv_best_gain": mean[best],
    }
    return Correction(block, _path(x[block], residual).fit(K, alpha), facts)


def _path(x_NF: np.ndarray, residual_NG: np.ndarray) -> RidgePath:
    """Return the ridge regression of the residuals on the features, for any penalty and number of programmes."""
    table = SectionTable(x_NF, {"correction": residual_NG}, np.ones(residual_NG.shape[1], bool))
    return RidgePath([table], "correction")


def base_head(readout: Readout, cohort: str, species: str) -> CohortHead:
    """Return the head of a cohort that corrections are added to: its own head or, without one, the mean of the species' heads.

    A gene is averaged over the heads that have it. All blocks of features get the same positive weight, so that each can be
    corrected. Their means and loadings are rescaled, so that the predictions of the cohort's own head do not change.

    Raises
    ------
    ValueError
        The cohort has no head, and no head has genes of the species, or their heads have more kernels than an export may have.
    """
    own = [h for h in readout.heads if h.cohort == cohort]
    heads = own or [h for h in readout.heads if any(k.startswith(f"{species}:") for k in h.keys)]
    if not heads:
        raise ValueError(f"the model has no trained genes of species {species}; adapt a model that was trained on it")
    keys = list(dict.fromkeys(k for h in heads for k in h.keys if k.startswith(f"{species}:")))
    levels = float(np.mean([h.levels for h in heads]))
    names = list(heads[0].blocks)
    known = np.array([[k in set(h.keys) for k in keys] for h in heads])
    share = known / known.sum(0)
    merged = {b: {norm: _merged(heads, b, norm, keys, share, 1 / len(names)) for norm in NORMS} for b in names}
    blocks = {b: {norm: head for norm, (_, head) in norms.items()} for b, norms in merged.items()}
    maps = {b: norms[NORMS[0]][0] for b, norms in merged.items()}
    n_kernels = max(len(m.kernels) for m in maps.values())
    if n_kernels > MOST_KERNELS:
        raise ValueError(
            f"the model has no head for {cohort}, and the {len(heads)} heads of {species} have {n_kernels} kernels, more than the "
            f"{MOST_KERNELS} of an export; adapt a model of fewer tissues, or one that was trained with readout.kind=linear"
        )
    mix = dict.fromkeys(NORMS, dict.fromkeys(names, (1 - levels) / len(names)) | {"levels": levels})
    mean_F, std_F = (np.mean([getattr(h, name) for h in heads], axis=0) for name in ("mean_F", "std_F"))
    return CohortHead(cohort, keys, mean_F, std_F, blocks, mix, maps, dict(own[0].facts) if own else {})


def _merged(
    heads: list[CohortHead], block: str, norm: str, keys: list[str], share_HG: np.ndarray, weight: float
) -> tuple[FeatureMap, NormHead]:
    """Return one block of the merged head; ``share_HG`` weights the heads, and ``weight`` is the block's new mixing weight."""
    mean, std = np.zeros(len(keys)), np.zeros(len(keys))
    weights, loadings = [], []
    for head, share in zip(heads, share_HG, strict=True):
        index = {k: i for i, k in enumerate(head.keys)}
        row, at = np.array([index.get(k, 0) for k in keys]), share > 0
        part, factor = head.blocks[block][norm], share * head.head_mix(norm)[block] / weight
        mean += factor * np.where(at, part.mean_G[row], 0)
        std += share * np.where(at, part.std_G[row], 0)
        weights.append(part.weight_FK)
        loadings.append(factor * np.where(at, part.std_G[row] * part.loading_KG[:, row], 0))
    std = np.where(std > 1e-9, std, 1.0)
    joined, weight_MK = join([head.map_of(block) for head in heads], weights)
    weight_MK, loading_KG = _distinct_programmes(weight_MK, np.concatenate(loadings))
    return joined, NormHead(weight_MK, loading_KG / std, mean, std)


def _distinct_programmes(weight_MK: np.ndarray, loading_KG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a head's weights and loadings with each programme once; the loadings of equal programmes are added.

    The head of a tissue that a model was adapted to has the programmes of the heads that it was merged from. Without this, the next merge
    would have them twice, and each further tissue would double the size of the readout.
    """
    _, first, of = np.unique(weight_MK, axis=1, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.argsort(order)
    added = np.zeros((len(first), loading_KG.shape[1]))
    np.add.at(added, rank[of.ravel()], loading_KG)
    return weight_MK[:, first[order]], added


def corrected_head(base: CohortHead, columns: np.ndarray, corrections: dict[str, Correction | None]) -> CohortHead:
    """Return a head with corrections added.

    Parameters
    ----------
    base
        From :func:`base_head`.
    columns
        Indices into ``base.keys`` of the corrected genes, in the order of the corrections' genes.
    corrections
        One correction per normalisation; None leaves the head of that normalisation unchanged.
    """
    blocks = {name: dict(norms) for name, norms in base.blocks.items()}
    maps = {name: base.map_of(name) for name in blocks}
    for block in {c.block: None for c in corrections.values() if c is not None}:
        own = {norm: c.head for norm, c in corrections.items() if c is not None and c.block == block}
        n_features = next(len(head.weight_FK) for head in own.values())
        for norm, old in base.blocks[block].items():
            weights = [old.weight_FK, own[norm].weight_FK if norm in own else np.zeros((n_features, 0))]
            maps[block], weight = join([base.map_of(block), FeatureMap()], weights)
            blocks[block][norm] = replace(old, weight_FK=weight)
            if norm in own:
                mean, loading = _added(old, own[norm], columns, base.mix[norm][block])
                blocks[block][norm] = NormHead(weight, np.concatenate([old.loading_KG, loading]), mean, old.std_G)
    return replace(base, blocks=blocks, maps=maps)


def _added(old: NormHead, new: NormHead, columns: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return means (G,) and the loadings (K, G) of the new programmes, for a block whose weight in the mixture is ``share``."""
    mean, loading = old.mean_G.copy(), np.zeros((new.loading_KG.shape[0], old.loading_KG.shape[1]))
    mean[columns] += new.mean_G / share
    loading[:, columns] = new.std_G * new.loading_KG / (share * old.std_G[columns])
    return mean, loading


def with_head(readout: Readout, head: CohortHead) -> Readout:
    """Return the readout with the head of its cohort added or replaced."""
    return Readout(readout.settings, [*(h for h in readout.heads if h.cohort != head.cohort), head])
