"""Selection of the genes of a run, and of the genes of one training step (the panel).

There are three lists of genes: *trained* genes, *held-out* genes (excluded from training, to evaluate unseen genes), and the
*panel* of a step, which is drawn from the trained genes that the sections in the step's batch measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from comtip_shards.format.statistics import SectionStatistics
from comtip_shards.sampling.rng import generator
from scipy import sparse

from comtip_fast.config.schema import GenesConfig, PanelConfig
from comtip_fast.data.expression.held_out import drawn_symbols

_SIMULATED, _ITERATIONS = 512, 50
"""Numbers of simulated batches and of iterations with which :func:`assay_balance` fits its weights."""


@dataclass
class GeneChoice:
    """Trained and held-out genes, as rows of the shard set's gene table (int64)."""

    trained: np.ndarray
    """Trained genes, ascending."""
    held_out: np.ndarray
    """Held-out genes, ascending."""
    ranked: dict[str, np.ndarray]
    """Genes on which each cohort is scored, by decreasing variance: those that reach ``genes.min_detection`` in every training
    section that measured them."""
    eligible: dict[str, np.ndarray] = field(default_factory=dict)
    """Genes of each cohort that may be trained, by decreasing variance (``genes.detected_in``)."""


def rank_by_variance(
    values: list[sparse.csr_matrix], measured: list[np.ndarray], min_detection: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rank the genes of one cohort by the variance of log1p CP10K over its training sections.

    A gene is eligible if it is detected in at least a share ``min_detection`` of the spots of every training section
    that measured it.

    Parameters
    ----------
    values, measured
        Per training section: log1p CP10K (n, genes), and whether each gene was measured, bool (genes,).
    min_detection
        Smallest detection rate, 0 to 1.

    Returns
    -------
    rows, variance
        Eligible gene rows by decreasing variance, and the variance of each.
    """
    sections = [
        (np.flatnonzero(known), _statistics_of(value[:, known])) for value, known in zip(values, measured, strict=True)
    ]
    return CohortStatistics.of(sections, values[0].shape[1]).ranked(min_detection, "every")


def _statistics_of(values: sparse.csr_matrix) -> SectionStatistics:
    """Return the statistics of log1p CP10K (n, genes)."""
    sums = (np.asarray(m.sum(axis=0)).ravel() for m in (values > 0, values, values.multiply(values)))
    return SectionStatistics(values.shape[0], *sums)


@dataclass
class CohortStatistics:
    """Statistics of each gene of the set over the sections of one cohort, arrays (genes,)."""

    spots: np.ndarray
    """Number of spots of the sections that measured the gene."""
    total: np.ndarray
    """Sum of log1p CP10K over these spots."""
    square: np.ndarray
    """Sum of squared log1p CP10K over these spots."""
    detected: np.ndarray
    """Number of spots in which the gene was detected."""
    least: np.ndarray
    """Smallest detection rate over the sections that measured the gene."""
    most: np.ndarray
    """Largest detection rate over these sections."""

    @classmethod
    def of(cls, sections: Sequence[tuple[np.ndarray, SectionStatistics]], n_genes: int) -> CohortStatistics:
        """Combine the statistics of sections.

        Parameters
        ----------
        sections
            Per section: rows of its measured genes, and their statistics.
        n_genes
            Number of genes in the set.
        """
        zeros = np.zeros((4, n_genes))
        out = cls(zeros[0], zeros[1], zeros[2], zeros[3], np.ones(n_genes), np.zeros(n_genes))
        for rows, one in sections:
            out.add(rows, one)
        return out

    def add(self, rows: np.ndarray, one: SectionStatistics) -> None:
        """Add a section that measured the genes ``rows``."""
        rate = one.detected / max(one.n_spots, 1)
        self.spots[rows] += one.n_spots
        self.total[rows] += one.total
        self.square[rows] += one.square
        self.detected[rows] += one.detected
        self.least[rows] = np.minimum(self.least[rows], rate)
        self.most[rows] = np.maximum(self.most[rows], rate)

    def ranked(self, min_detection: float, detected_in: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the eligible gene rows by decreasing variance, and the variance of each.

        ``detected_in`` names the rule; see :attr:`.schema.GenesConfig.detected_in`.
        """
        n = np.maximum(self.spots, 1)
        rate = {"any": self.most, "pooled": self.detected / n, "every": self.least}[detected_in]
        variance = self.square / n - (self.total / n) ** 2
        rows = np.flatnonzero((self.spots > 0) & (rate >= min_detection))
        rows = rows[np.lexsort((rows, -variance[rows]))]
        return rows, variance[rows]


def choose_genes(
    ranked: dict[str, np.ndarray],
    symbols: list[str],
    config: GenesConfig,
    eligible: dict[str, np.ndarray] | None = None,
    seed: int = 0,
) -> GeneChoice:
    """Select trained and held-out genes from the rankings of all cohorts.

    A gene that is held out for one cohort is held out for all. Its orthologues (same upper-case symbol) are held out too,
    because they have the same text. The first ``held_out_from`` genes of a ranking in ``ranked`` are held out only if
    ``config.held_out`` names them.

    Parameters
    ----------
    ranked
        Rows of the genes on which each cohort is scored, by decreasing variance.
    symbols
        Symbol of each row of the gene table.
    config
        Settings of the selection (``genes``).
    eligible
        Rows of the genes that may be trained for each cohort, by decreasing variance; None: the same as ``ranked``.
    seed
        Seed of ``config.held_out_draw``.

    Raises
    ------
    ValueError
        ``config.held_out_draw`` is ``families``, but no family can be held out.
    """
    names = np.array([s.upper() for s in symbols])
    eligible = ranked if eligible is None else eligible
    selected = [r[: config.per_cohort] if config.per_cohort else r for r in eligible.values()]
    # A cohort is scored on its most variable genes, so these are held out only by name.
    kept = {n for rows in ranked.values() for n in names[rows[: config.held_out_from]].tolist()}
    out = {s.upper() for s in config.held_out} | drawn_symbols(selected, names, kept, config, seed)
    # Genes that a cohort is scored on are trained at any variance rank among the eligible ones.
    scored = [r[: min(config.held_out_from, config.per_cohort or r.size)] for r in ranked.values()]
    chosen = np.unique(np.concatenate([*selected, *scored]))
    held_out = np.isin(names[chosen], list(out))
    return GeneChoice(chosen[~held_out], chosen[held_out], ranked, eligible)


def assay_balance(measured_SG: np.ndarray, n_spots_S: np.ndarray, sections_per_batch: int | None) -> np.ndarray:
    """Return weights with which all genes are drawn equally often even if sections have gene lists of different sizes.

    Genes that were measured in the same training sections have the same weight. Weights are fitted to the draws of 512 simulated
    batches. Equal frequencies are impossible if a batch can have only sections with small lists; they are then as similar as
    possible.

    Parameters
    ----------
    measured_SG
        bool (S, G): whether the section measured the gene.
    n_spots_S
        Number of training spots of each section (S,); 0 for sections of other splits.
    sections_per_batch
        Number of sections that a batch is drawn from; None for all.

    Returns
    -------
    ndarray
        float64 (G,), from 0.001 to 1; all 1 if the training sections measured the same genes, or if ``sections_per_batch`` is
        None.
    """
    train = np.flatnonzero(n_spots_S)
    # Genes are grouped by the bytes of their column, because np.unique over an axis takes seconds for many sections.
    columns = np.ascontiguousarray(measured_SG[train].T)
    number: dict[bytes, int] = {}
    list_of_gene = np.array([number.setdefault(column.tobytes(), len(number)) for column in columns])
    _, first, size_P = np.unique(list_of_gene, return_index=True, return_counts=True)
    lists_SP = columns[first].T
    known = lists_SP.any(0)
    if known.sum() <= 1 or sections_per_batch is None:
        return np.ones(measured_SG.shape[1])
    share = n_spots_S[train] / n_spots_S.sum()
    chosen = generator(0, "panel-balance").choice(train.size, (_SIMULATED, sections_per_batch), p=share)
    available_MP = lists_SP[chosen].any(1)
    weight_P = np.ones(size_P.size)
    for _ in range(_ITERATIONS):
        drawn_P = (available_MP * weight_P / np.maximum(available_MP @ (weight_P * size_P), 1e-12)[:, None]).mean(0)
        reached = known & (drawn_P > 0)
        weight_P[reached] *= np.sqrt(drawn_P[reached].min() / drawn_P[reached])
        weight_P = np.clip(weight_P / weight_P[known].max(), 1e-3, 1.0)
    return weight_P[list_of_gene]


def draw_panel(
    trained: np.ndarray,
    weight: np.ndarray,
    available: np.ndarray,
    config: PanelConfig,
    *,
    seed: int,
    step: int,
    balance: np.ndarray | None = None,
    measured: np.ndarray | None = None,
) -> np.ndarray:
    """Draw the panel of a step and return ascending indices into ``trained``.

    The panel's size is log-uniform between the bounds of ``config``, as far as genes are available. A share
    ``config.variable_share`` of the genes is drawn with probability proportional to ``weight``, and the rest uniformly; ``balance``
    multiplies both probabilities.

    Parameters
    ----------
    trained
        Gene-table rows of the G trained genes.
    weight
        Variance of each gene (G,), the weight of the first draw.
    available
        bool (G,): whether at least one section of the global batch measured the gene.
    config
        Smallest and largest panel, and the share drawn by variance.
    seed, step
        Seed and step of the random numbers; with equal other arguments, they determine the panel.
    balance
        Result of :func:`assay_balance` (G,); None for equal weights.
    measured
        bool (sections of the batch, G): whether the section measured the gene. If given, a panel that is large enough contains, for
        each section, at least one gene that it measured.
    """
    rng = generator(seed, "panel", step)
    candidates = np.flatnonzero(available)
    hi = min(config.max_genes, candidates.size)
    lo = min(config.min_genes, hi)
    size = int(np.clip(np.exp(rng.uniform(np.log(lo), np.log(hi + 1))), lo, hi))
    n_weighted = round(size * config.variable_share)
    own = np.ones(candidates.size) if balance is None else balance[candidates]
    balanced = bool(np.ptp(own))
    # Weighted sampling without replacement by exponential races (Efraimidis and Spirakis 2006).
    race = rng.exponential(size=candidates.size) / np.maximum(
        weight[candidates] * own if balanced else weight[candidates], 1e-9
    )
    first = np.argsort(race, kind="stable")[:n_weighted]
    weighted, left = candidates[first], np.ones(candidates.size, bool)
    left[first] = False
    rest = candidates[left]
    if balanced:
        assert balance is not None
        uniform = rest[np.argsort(rng.exponential(size=rest.size) / balance[rest], kind="stable")]
    else:
        uniform = rng.permutation(rest)
    panel = np.concatenate([weighted, uniform[: size - n_weighted]])
    if measured is not None:
        panel = _with_every_section(panel, measured, rng)
    return np.sort(panel)


def _with_every_section(panel: np.ndarray, measured: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the panel with genes replaced so that every section measured at least one of its genes, if it is large enough.

    A gene is replaced only if each section that measured it also measured another gene of the panel.
    """
    panel = panel.copy()
    for genes in measured:
        if genes[panel].any() or not genes.any():
            continue
        covered = measured[:, panel]
        alone = covered & (covered.sum(1, keepdims=True) == 1)
        free = np.flatnonzero(~alone.any(0))
        if free.size:
            panel[rng.choice(free)] = rng.choice(np.flatnonzero(genes))
    return panel
