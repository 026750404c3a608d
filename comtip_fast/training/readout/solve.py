"""Closed-form fit of the readout: programmes, ridge regression, and selection of rank and penalty.

Shapes: N spots, F features, G genes, K programmes; see :mod:`comtip_fast.models.readout.heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from comtip_fast.models.readout.features import ReadoutSettings
from comtip_fast.models.readout.heads import NORMS, CohortHead, NormHead
from comtip_fast.models.readout.kernel_map import FeatureMap, KernelMap, join

KINDS = ("kernel", "linear")
"""Kinds of heads: by kernel ridge regression (:mod:`comtip_fast.models.readout.kernel_map`) and by ridge regression on the features."""
FROZEN_SHARE = {"kernel": 1.0, "linear": 2.0}
"""Share of the head on frozen features, by the kind of the head on z, whose share is 1. A linear head on z transfers worse to another
donor (docs/ablations.md)."""


@dataclass
class SectionTable:
    """Features and expression of one section, for fitting."""

    x_NF: np.ndarray
    """Standardised features."""
    y: dict[str, np.ndarray]
    """Expression (N, G), log1p, for each normalisation of counts (:data:`NORMS`)."""
    measured_G: np.ndarray
    """bool: whether the section measured each gene."""


@dataclass(frozen=True)
class DecomposedFeatures:
    """The features of some sections, decomposed once for all targets, penalties and numbers of programmes.

    With the penalty a and the smaller Gram matrix U diag(p) U^T, the ridge weights of targets T are

        X^T U (p + a)^-1 U^T T  for  X X^T = U diag(p) U^T         U (p + a)^-1 U^T X^T T  for  X^T X = U diag(p) U^T

    Neither form divides by p, which for float32 features is known to 1e-7 of its largest value only.
    """

    x_NF: np.ndarray
    """Features of the N spots of all sections."""
    vectors: np.ndarray
    """Eigenvectors U of the smaller Gram matrix, (N, N) or (F, F), float64."""
    power: np.ndarray
    """Eigenvalues p, at least 0."""

    @classmethod
    def of(cls, sections: Sequence[SectionTable]) -> DecomposedFeatures:
        """Decompose the features of the sections."""
        x = np.concatenate([s.x_NF for s in sections])
        gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
        power, vectors = np.linalg.eigh(gram.astype(np.float64))
        return cls(x, vectors, np.maximum(power, 0.0))

    @property
    def of_spots(self) -> bool:
        """Whether the Gram matrix is that of the spots, X X^T."""
        return self.x_NF.shape[0] < self.x_NF.shape[1]

    def project(self, targets_NG: np.ndarray) -> np.ndarray:
        """Return U^T T or U^T X^T T for :meth:`weights`, float64."""
        if self.of_spots:
            return self.vectors.T @ targets_NG
        return self.vectors.T @ (self.x_NF.T @ targets_NG.astype(self.x_NF.dtype))

    def weights(self, projected: np.ndarray, penalty: float) -> np.ndarray:
        """Return the ridge weights (F, K) of projected targets."""
        out = self.vectors @ (projected / (self.power + penalty)[:, None])
        return self.x_NF.T @ out.astype(self.x_NF.dtype) if self.of_spots else out


class RidgePath:
    """Ridge regression of programme scores on features, for any penalty and number of programmes.

    Parameters
    ----------
    sections
        The sections.
    norm
        Normalisation of counts.
    design
        Their decomposed features; None decomposes them.
    per_spot
        Whether the penalty is ``alpha`` times the number of spots, or ``alpha``. With kernel features, ``alpha`` is the variance of
        the noise of a Gaussian process whose own variance is 1, which does not depend on the number of spots.
    """

    def __init__(
        self,
        sections: Sequence[SectionTable],
        norm: str,
        design: DecomposedFeatures | None = None,
        *,
        per_spot: bool = True,
    ) -> None:
        measured = np.stack([s.measured_G for s in sections])
        centred = [np.where(s.measured_G, s.y[norm] - s.y[norm].mean(0), 0.0) for s in sections]
        n_G = np.maximum(sum(len(c) * s.measured_G for c, s in zip(centred, sections, strict=True)), 1)
        self.mean_G = sum(np.where(s.measured_G, s.y[norm].sum(0), 0.0) for s in sections) / n_G
        y = np.concatenate(centred)
        self.std_G = np.sqrt((y**2).sum(0) / n_G)
        self.y_NG = y / np.where(self.std_G > 1e-9, self.std_G, 1.0)
        self.row_measured = np.concatenate([np.tile(s.measured_G, (len(s.x_NF), 1)) for s in sections])
        # Programmes are computed from the genes that every section measured; the loadings of other genes are regressed on
        # the programme scores.
        common = np.flatnonzero(measured.all(0))
        self.common = common if common.size >= 2 else np.arange(measured.shape[1])
        own = self.y_NG[:, self.common]
        self.programmes_GK = np.linalg.eigh(own.T @ own)[1][:, ::-1]
        self.design = design or DecomposedFeatures.of(sections)
        self.projected = self.design.project(own)
        self.penalty = len(self.design.x_NF) if per_spot else 1

    def fit(self, programmes: int, alpha: float) -> NormHead:
        """Return the head with K programmes and the ridge penalty ``alpha``.

        K is ``programmes``, at most the number of genes that programmes are computed from; 0 selects this number.
        """
        K = min(programmes or self.common.size, self.common.size)
        scores = self.y_NG[:, self.common] @ self.programmes_GK[:, :K]
        weight = self.design.weights(self.projected @ self.programmes_GK[:, :K], alpha * self.penalty)
        loading = np.zeros((K, self.y_NG.shape[1]))
        loading[:, self.common] = self.programmes_GK[:, :K].T
        rest = np.setdiff1d(np.arange(self.y_NG.shape[1]), self.common)
        for pattern in np.unique(self.row_measured[:, rest], axis=1).T if rest.size else []:
            genes = rest[(self.row_measured[:, rest] == pattern[:, None]).all(0)]
            t = scores[pattern]
            gram = t.T @ t + 1e-6 * max(len(t), 1) * np.eye(K)
            loading[:, genes] = np.linalg.solve(gram, t.T @ self.y_NG[pattern][:, genes])
        return NormHead(weight, loading, self.mean_G, self.std_G)


@dataclass(frozen=True)
class ReadoutGrid:
    """Candidates for the number of programmes (0: as many as possible, see :meth:`RidgePath.fit`) and the ridge penalty."""

    programmes: tuple[int, ...] = (5, 10, 20, 0)
    alphas: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0)


def mixture(blocks: Sequence[str], kind: str, n_donors: int, min_donors: int) -> dict[str, float]:
    """Return the weight of the head on each block of features, and of the prediction from level sentences (``levels``).

    With n heads, the level sentences have the weight 1 / (1 + 2 n); the heads have the rest, with the shares of :data:`FROZEN_SHARE`
    for the ``kind`` of the head on the image vector z (block ``vector``). That head has weight 0 with fewer than ``min_donors``
    training donors, unless z is the only block: z was trained on the expression of the same spots, so it overfits.
    """
    share = {b: FROZEN_SHARE[kind] if b == "frozen" else 1.0 for b in blocks}
    used = [b for b in blocks if b != "vector" or n_donors >= min_donors or len(blocks) == 1]
    levels = 1 / (1 + 2 * len(used))
    total = sum(share[b] for b in used)
    return {b: (1 - levels) * share[b] / total if b in used else 0.0 for b in blocks} | {"levels": levels}


@dataclass(frozen=True)
class CohortData:
    """Training and validation sections of one cohort."""

    cohort: str
    keys: list[str]
    """Keys of the G genes."""
    train: list[SectionTable]
    valid: list[SectionTable]
    mean_F: np.ndarray
    """Mean of the training features, used to standardise sections with few spots."""
    std_F: np.ndarray
    """Standard deviation of the training features, for the same purpose."""
    score_genes: np.ndarray
    """Indices of the genes on which candidates are compared."""
    n_donors: int = 1
    """Number of donors of the training sections."""
    scale_F: np.ndarray | None = None
    """Factor of each standardised feature in the ridge penalty; None for 1."""


def fit_cohort(
    data: CohortData,
    settings: ReadoutSettings,
    *,
    kinds: Sequence[str] = KINDS,
    min_donors: int = 1,
    grid: ReadoutGrid | None = None,
) -> CohortHead:
    """Fit the heads of one cohort on its training sections.

    The ridge penalty and the number of programmes are those with the highest mean PCC on the validation sections. Without
    validation sections that measured a gene to score, they are selected by leave-one-section-out on the training sections; with a
    single training section, candidates from the middle of the grid are used.

    Parameters
    ----------
    data
        The sections.
    settings
        Layout of the features.
    kinds
        Candidates for the kind of a head, of :data:`KINDS`; the one with the highest mean PCC is used, the first without scores.
    min_donors
        Number of training donors that the head on z requires, see :func:`mixture`.
    grid
        The candidates; None uses the default grid.
    """
    data = replace(data, valid=[s for s in data.valid if s.measured_G[data.score_genes].any()])
    n_features = data.train[0].x_NF.shape[1]
    names = settings.block_names(n_features)
    scale = np.ones(n_features) if data.scale_F is None else data.scale_F
    blocks: dict[str, BlockHeads] = {}
    maps: dict[str, FeatureMap] = {}
    facts: dict[str, Any] = {"donors": data.n_donors, "chosen_on": "val" if data.valid else "train"}
    for block in names:
        columns = settings.columns(block, n_features)
        train, valid = ([replace(s, x_NF=s.x_NF[:, columns]) for s in part] for part in (data.train, data.valid))
        factor = scale[columns].astype(data.train[0].x_NF.dtype)
        fits = {kind: _fit_block(kind, train, valid, factor, data.score_genes, grid or ReadoutGrid()) for kind in kinds}
        maps[block], blocks[block], facts[block] = _best_of(fits)
    kind_of_z = {norm: facts[names[0]][norm]["kind"] for norm in NORMS}
    mix = {norm: mixture(names, kind_of_z[norm], data.n_donors, min_donors) for norm in NORMS}
    return CohortHead(data.cohort, data.keys, data.mean_F, data.std_F, blocks, mix, maps, facts)


BlockHeads = dict[str, NormHead]
BlockFacts = dict[str, dict[str, Any]]
BlockFit = tuple[FeatureMap, BlockHeads, BlockFacts]
"""What the weights of a block's heads multiply, its head of each normalisation, and how that was chosen."""


def _best_of(fits: dict[str, BlockFit]) -> BlockFit:
    """Return the kind with the highest score for each normalisation; features of another kind have the weight 0."""
    used = {
        norm: max(fits, key=lambda kind: -1.0 if (score := fits[kind][2][norm]["score"]) is None else score)
        for norm in NORMS
    }
    kinds = [kind for kind in fits if kind in used.values()]
    facts = {norm: {"kind": kind} | fits[kind][2][norm] for norm, kind in used.items()}
    heads: BlockHeads = {}
    for norm, kind in used.items():
        head = fits[kind][1][norm]
        weights = [
            head.weight_FK if other == kind else np.zeros((len(fits[other][1][norm].weight_FK), 0)) for other in kinds
        ]
        joined, weight = join([fits[other][0] for other in kinds], weights)
        heads[norm] = replace(head, weight_FK=weight)
    return joined, heads, facts


def _fit_block(
    kind: str,
    train: list[SectionTable],
    valid: list[SectionTable],
    factor_F: np.ndarray,
    genes: np.ndarray,
    grid: ReadoutGrid,
) -> BlockFit:
    """Choose the number of programmes and the penalty of each normalisation, and fit its head on all training sections."""
    design = _Design.of(kind, train, factor_F)
    heads: BlockHeads = {}
    facts: BlockFacts = {}
    for norm, (K, alpha, score) in _choose(design, _folds(train, valid), genes, grid).items():
        head = design.path(norm).fit(K, alpha)
        heads[norm] = replace(head, weight_FK=design.weights(head.weight_FK))
        facts[norm] = {"programmes": K, "alpha": alpha, "score": score}
    return design.mapped, heads, facts


Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Design:
    """The features on which heads of a kind are fitted to some sections."""

    kind: str
    factor_F: np.ndarray
    """Factors of the block's features in the penalty, or in distances."""
    fitted: list[SectionTable]
    """The sections, unchanged."""
    mapped: FeatureMap
    """What the weights of the heads multiply. Its landmarks are spots of these sections; expression does not select them."""
    transform: Transform
    """Maps features of the block to those on which ridge regression is fitted."""
    weights: Transform
    """Maps the weights of this ridge regression to those of the map."""
    sections: list[SectionTable]
    """The sections with transformed features."""
    decomposed: DecomposedFeatures

    @classmethod
    def of(cls, kind: str, sections: list[SectionTable], factor_F: np.ndarray) -> _Design:
        """Choose the kernel of kernel heads on the sections, and decompose their features."""
        mapped, transform, weights = _transforms(kind, np.concatenate([s.x_NF for s in sections]), factor_F)
        found = [replace(s, x_NF=transform(s.x_NF)) for s in sections]
        return cls(kind, factor_F, sections, mapped, transform, weights, found, DecomposedFeatures.of(found))

    def on(self, sections: list[SectionTable]) -> _Design:
        """Return the design of a fold, whose sections are all or some of these; its kernel has no landmark of another section."""
        return self if sections is self.fitted else _Design.of(self.kind, sections, self.factor_F)

    def path(self, norm: str) -> RidgePath:
        """Return ridge regression for a normalisation of counts."""
        return RidgePath(self.sections, norm, self.decomposed, per_spot=self.kind == "linear")


def _transforms(kind: str, x_NF: np.ndarray, factor_F: np.ndarray) -> tuple[FeatureMap, Transform, Transform]:
    """Return the attributes ``mapped``, ``transform`` and ``weights`` of :class:`_Design` for training features ``x_NF``."""
    if kind == "linear":
        return FeatureMap(), lambda x: x * factor_F, lambda w: factor_F[:, None] * w
    kernel = KernelMap.fit(x_NF, factor_F)
    whitening = kernel.whitening()
    return FeatureMap([kernel], linear=False), lambda x: kernel(x) @ whitening, lambda w: whitening @ w


Folds = list[tuple[list[SectionTable], list[SectionTable]]]


def _folds(train: list[SectionTable], valid: list[SectionTable]) -> Folds:
    """Return pairs (sections to fit, sections to score): the splits ``train`` and ``val``, or leave-one-out without ``val``."""
    if valid:
        return [(train, valid)]
    return [([s for s in train if s is not t], [t]) for t in train] if len(train) > 1 else []


def _choose(
    design: _Design, folds: Folds, genes: np.ndarray, grid: ReadoutGrid
) -> dict[str, tuple[int, float, float | None]]:
    """Return the best number of programmes and ridge penalty, and their mean PCC (None without folds), per normalisation.

    Sections that measured none of ``genes`` are not scored; a fold without another section is left out. ``design`` is that of all training
    sections; those of leave-one-out folds, which do not contain the section that is left out, are computed one after the other, so that one
    is in memory.
    """
    pairs = [(K, a) for K in grid.programmes for a in grid.alphas]
    scored = [(fit, [s for s in held_out if s.measured_G[genes].any()]) for fit, held_out in folds]
    folds = [fold for fold in scored if fold[1]]
    if not folds:
        middle = pairs[len(pairs) // 2 - 1][0], grid.alphas[len(grid.alphas) // 2], None
        return dict.fromkeys(NORMS, middle)
    total = {norm: np.zeros(len(pairs)) for norm in NORMS}
    for fit, held_out in folds:
        own = design.on(fit)
        mapped = [replace(s, x_NF=own.transform(s.x_NF)) for s in held_out]
        for norm in NORMS:
            path = own.path(norm)
            heads = (path.fit(K, alpha) for K, alpha in pairs)
            total[norm] += [np.mean([_mean_pcc(head, s, norm, genes) for s in mapped]) for head in heads]
    best = {norm: int(scores.argmax()) for norm, scores in total.items()}
    return {norm: (*pairs[i], float(total[norm][i] / len(folds))) for norm, i in best.items()}


def _mean_pcc(head: NormHead, section: SectionTable, norm: str, genes: np.ndarray) -> float:
    """Return the mean PCC of a head's predictions on a section; an undefined PCC counts as 0."""
    genes = genes[section.measured_G[genes]]
    if not genes.size:
        return 0.0
    a = section.y[norm][:, genes]
    b = (section.x_NF @ head.weight_FK.astype(section.x_NF.dtype)) @ head.loading_KG[:, genes]
    a, b = a - a.mean(0), b - b.mean(0)
    norm_G = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return float(np.where(norm_G > 1e-12, (a * b).sum(0) / np.maximum(norm_G, 1e-12), 0.0).mean())
