"""References for the scores of unseen genes: the mean map of the seen genes, and controls that exchange what identifies a gene.

Shapes: N spots, U unseen genes, H the (up to 50) most variable of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from comtip_shards.sampling.rng import generator

from comtip_fast.evaluation.metrics import mean_scores, partial_pcc_per_gene, score_from_genes
from comtip_fast.genes.vectors import GeneVectors
from comtip_fast.inference import GeneQuery, Predictor, SectionFeatures, SectionPrediction
from comtip_fast.inference.levels import GENES_PER_CHUNK, NORMS
from comtip_fast.metrics import pcc_per_gene

SHUFFLES = 10
"""Number of draws of each shuffled control; a draw decodes the unseen genes at most once more."""
MEAN_MAP, NAMES, VECTORS = "unseen_mean_map", "unseen_names_shuffled", "unseen_vectors_shuffled"
Maps = dict[str, np.ndarray]
"""{normalisation: predicted log1p expression, spots x genes}."""
Predict = Callable[[np.ndarray], Maps]
"""Returns the maps of some of the unseen genes, so that few are in memory at a time."""
Scores = dict[str, dict[str, Any]]
"""{normalisation: fields of :class:`comtip_fast.evaluation.metrics.Score`}."""


@dataclass(frozen=True)
class UnseenGenes:
    """The unseen genes of one section, among G predicted genes, and what their references are computed from."""

    predictor: Predictor
    features: SectionFeatures
    section_id: str
    cohort: str
    xy: np.ndarray
    """Positions of the spots, (N, 2)."""
    queries: Sequence[GeneQuery]
    """The G genes."""
    unseen: np.ndarray
    """int64 (U,), indices into ``queries``, by decreasing variance."""
    seen: Sequence[GeneQuery]
    """The trained genes that the section measured."""
    measured: Maps
    """Measured expression of the G genes."""
    predicted: Maps
    """Predicted expression of the G genes."""
    covariates: np.ndarray
    """See :attr:`comtip_fast.evaluation.gene_table.ScoringInputs.covariates`."""
    n_top: int
    """H."""
    seed: int

    @property
    def own(self) -> list[GeneQuery]:
        """The U unseen genes."""
        return [self.queries[i] for i in self.unseen.tolist()]


def unseen_references(u: UnseenGenes) -> tuple[dict[str, Scores], Maps | None]:
    """Return the scores of the mean map and of the shuffled controls, by name, and the mean map (N, 1).

    ``unseen_mean_map``
        The mean of the predicted maps of the seen genes, each standardised over the spots: the same map for every unseen gene.
    ``unseen_names_shuffled``
        Every unseen gene is predicted with symbol and full name of another unseen gene, and with its own gene vector.
    ``unseen_vectors_shuffled``
        Every unseen gene that has a gene vector is predicted with that of another unseen gene, and with its own name.

    Names and vectors are exchanged among the unseen genes, so that a control differs from the scored prediction only in which gene
    has which of them. A control is the mean score of :data:`SHUFFLES` draws. There is no mean map without seen genes, and no
    control if fewer than two genes can be exchanged: names count only for genes that are predicted from level sentences.
    """
    out: dict[str, Scores] = {}
    mean = _mean_map(u)
    if mean is not None:
        out[MEAN_MAP] = _score(u, partial(_repeated, mean))
    for name, draw in ((NAMES, _names_drawn), (VECTORS, _vectors_drawn)):
        draws = [_score(u, maps) for maps in draw(u)]
        if draws:
            out[name] = {norm: mean_scores([d[norm] for d in draws]) for norm in NORMS}
    return out, mean


def exchanged(n: int, seed: int, purpose: str, *counters: str | int) -> np.ndarray:
    """Return a random order of ``n`` items in which none keeps its position, int64 (n,): a random cycle through all of them."""
    order = generator(seed, purpose, *counters).permutation(n)
    out = np.empty(n, np.int64)
    out[order] = np.roll(order, 1)
    return out


def _names_drawn(u: UnseenGenes) -> Iterator[Predict]:
    """Yield, for each draw, the prediction of the unseen genes with the names of others."""
    own, genes = np.flatnonzero(_read_names(u)), u.own
    for draw in range(SHUFFLES if own.size > 1 else 0):
        source = np.arange(len(genes))
        source[own] = own[exchanged(own.size, u.seed, "unseen-names", u.section_id, draw)]
        if u.predictor.vectors is None and u.predictor.sentence_vectors is None:
            # Without vectors, a gene that was not trained is its name: with another's name, it is predicted as the other.
            yield partial(_columns, u.predicted, u.unseen[source])
        else:
            names = [genes[i] for i in source.tolist()]
            named = [replace(q, symbol=o.symbol, name=o.name) for q, o in zip(genes, names, strict=True)]
            yield partial(_decoded, u, u.predictor, named)


def _vectors_drawn(u: UnseenGenes) -> Iterator[Predict]:
    """Yield, for each draw, the prediction of the unseen genes with the vectors of others."""
    p, genes = u.predictor, u.own
    keys = [q.key or "" for q in genes]
    for draw in range(SHUFFLES if sum(p.has_vector(k) for k in keys) > 1 else 0):
        other = copy.copy(p)
        other.vectors, other.sentence_vectors = (
            _exchanged_vectors(v, keys, u.seed, u.section_id, draw) for v in (p.vectors, p.sentence_vectors)
        )
        yield partial(_decoded, u, other, genes)


def _exchanged_vectors(
    vectors: GeneVectors | None, keys: Sequence[str], seed: int, section: str, draw: int
) -> GeneVectors | None:
    """Return gene vectors in which each of ``keys`` that has one has that of another; moments and other genes are unchanged."""
    if vectors is None:
        return None
    rows = np.array([vectors.row[k] for k in keys if k in vectors.row], np.int64)
    values = vectors.vector_GK.copy()
    values[rows] = vectors.vector_GK[rows[exchanged(rows.size, seed, "unseen-vectors", section, draw)]]
    return replace(vectors, vector_GK=values)


def _read_names(u: UnseenGenes) -> np.ndarray:
    """Return which unseen genes are predicted from level sentences, which contain their names, bool (U,)."""
    readout, keys = u.predictor.bundle.readout, [q.key or "" for q in u.own]
    if readout is None:
        return np.ones(len(keys), bool)
    read: np.ndarray = ~readout.decoder(keys, u.cohort, u.predictor.vectors).known
    return read


def _columns(maps: Maps, columns: np.ndarray, part: np.ndarray) -> Maps:
    return {norm: values[:, columns[part]] for norm, values in maps.items()}


def _decoded(u: UnseenGenes, predictor: Predictor, queries: Sequence[GeneQuery], part: np.ndarray) -> Maps:
    """Predict some of the genes ``queries``."""
    genes = [queries[i] for i in part.tolist()]
    return SectionPrediction(predictor, genes, u.cohort).predict_all(u.features.stored, len(u.xy), u.xy)


def _mean_map(u: UnseenGenes) -> Maps | None:
    """Return the mean of the standardised predictions of the seen genes, float64 (N, 1); None without seen genes."""
    column = {q.key: i for i, q in enumerate(u.queries)}
    there = np.array([column[q.key] for q in u.seen if q.key in column], np.int64)
    others = [q for q in u.seen if q.key not in column]
    total = {n: np.zeros((len(u.xy), 1)) for n in NORMS}
    sources: list[tuple[int, Predict]] = [
        (there.size, partial(_columns, u.predicted, there)),
        (len(others), partial(_decoded, u, u.predictor, others)),
    ]
    for n, predict in sources:
        for part in _parts(n):
            for norm, values in predict(part).items():
                x = values.astype(np.float64)
                std = x.std(0)
                total[norm] += ((x - x.mean(0)) / np.where(std > 1e-9, std, 1.0)).sum(1, keepdims=True)
    return {n: t / len(u.seen) for n, t in total.items()} if u.seen else None


def _repeated(maps: Maps, part: np.ndarray) -> Maps:
    return {norm: np.repeat(values, part.size, axis=1) for norm, values in maps.items()}


def _score(u: UnseenGenes, predict: Predict) -> Scores:
    """Score predicted maps of the unseen genes."""
    found = {n: (np.full(u.unseen.size, np.nan), np.full(u.n_top, np.nan)) for n in NORMS}
    for part in _parts(u.unseen.size):
        values, top = predict(part), part[part < u.n_top]
        for norm, (pcc, adjusted) in found.items():
            measured = u.measured[norm][:, u.unseen[part]]
            pcc[part] = pcc_per_gene(measured, values[norm])
            adjusted[top] = partial_pcc_per_gene(measured[:, : top.size], values[norm][:, : top.size], u.covariates)
    return {n: asdict(score_from_genes(pcc, adjusted, np.arange(u.n_top))) for n, (pcc, adjusted) in found.items()}


def _parts(n: int) -> Iterator[np.ndarray]:
    """Yield the indices below ``n``, some at a time."""
    for start in range(0, n, GENES_PER_CHUNK):
        yield np.arange(start, min(start + GENES_PER_CHUNK, n))
