"""Tasks on the shared space: retrieval, spatial domains, pair discrimination, and vectors of genes."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import torch
from comtip_shards.sampling.rng import generator

from comtip_fast.data.expression.strata import strata_from_levels
from comtip_fast.data.upload import upload
from comtip_fast.evaluation.nulls import moved_spots
from comtip_fast.evaluation.tasks.context import SectionInputs, TaskContext
from comtip_fast.evaluation.tasks.domains import SCORES, agreement, cluster, is_labelled
from comtip_fast.evaluation.tasks.expression import ZERO_SHOT, mean_rows
from comtip_fast.evaluation.tasks.gene_sets import closeness_by_species, orthologues
from comtip_fast.evaluation.tasks.intervals import (
    NO_INTERVAL,
    interval,
    label_weights,
    mean_interval,
    resampled,
    section_interval,
)
from comtip_fast.evaluation.tasks.pairs import PairScores, RankedPairs, gain
from comtip_fast.evaluation.tasks.retrieval import KS, chance, ranks, recall_at
from comtip_fast.evaluation.tasks.rows import NAN, TaskRow
from comtip_fast.evaluation.tasks.text import SpotSentences, gene_vectors
from comtip_fast.genes.families import families
from comtip_fast.inference import GeneQuery
from comtip_fast.models.readout.section_statistics import neighbour_mean
from comtip_fast.objectives import counted_swaps, permute_within_strata, take_from_other_spots

log = logging.getLogger("comtip_fast")
TEXT_GENES = 256
"""Largest number of genes whose sentences form the text of a spot."""
MIN_PER_LABEL = 3


# -- retrieval --------------------------------------------------------------------------------------------------


def retrieval_rows(context: TaskContext) -> list[TaskRow]:
    """Score image-to-gene and gene-to-image retrieval among the spots of each section, and of all sections of a cohort.

    The text of a spot consists of the (up to 256) most variable trained genes that all scored sections of its cohort measured,
    so that genes do not identify the section. A cohort without such genes has no rows. The control pairs the images with the
    texts of the spots in random order.
    """
    rows = []
    for cohort in dict.fromkeys(s.cohort for s in context.sections):
        own = [s for s in context.sections if s.cohort == cohort]
        keys = context.trained_and_measured(cohort, [s.number for s in own])[:TEXT_GENES]
        if not keys:
            log.warning(
                "retrieval: the sections of %s are left out: no gene that the model was trained on was measured in all of them",
                cohort,
            )
            continue
        queries = context.queries(keys)
        texts = [SpotSentences(context.predictor, queries, context.values(s, keys)).vectors() for s in own]
        images = [s.image.vector_ND for s in own]
        for section, image, text in zip(own, images, texts, strict=True):
            rows += _recall_rows(context, section.section_id, "within section", image, text, section.weights_DN)
        if len(own) > 1:
            rows += _across_rows(context, own, np.concatenate(images), np.concatenate(texts), cohort)
    return [*rows, *mean_rows([r for r in rows if r.method == "within section"], context)]


def _recall_rows(
    context: TaskContext, section: str, method: str, image: np.ndarray, text: np.ndarray, weights: np.ndarray
) -> list[TaskRow]:
    """Return the rows of recall at 1, 5 and 10 in both directions, with intervals and a random pairing as control."""
    n, rows = len(image), []
    mixed = generator(context.options.seed, "retrieval", section).permutation(n)
    for direction, query, key in (("image_to_gene", image, text), ("gene_to_image", text, image)):
        rank, control = ranks(query, key), ranks(query, key[mixed])
        for k in KS:
            hits = recall_at(rank, k)
            low, high = mean_interval(hits, weights)
            wrong = float(recall_at(control, k).mean())
            rows.append(
                TaskRow(
                    "retrieval",
                    section,
                    method,
                    f"{direction}_r{k}",
                    float(hits.mean()),
                    low,
                    high,
                    chance(n, k),
                    wrong,
                    n,
                )
            )
    return rows


def _across_rows(
    context: TaskContext, sections: list[SectionInputs], image: np.ndarray, text: np.ndarray, cohort: str
) -> list[TaskRow]:
    """Score retrieval among the spots of all sections of a cohort; the bootstrap draws blocks within each section."""
    draws = min(len(s.weights_DN) for s in sections)
    weights = (
        np.concatenate([s.weights_DN[:draws].reshape(draws, -1) for s in sections], axis=1) if draws else image[:0]
    )
    return _recall_rows(context, f"all of {cohort}", "across sections", image, text, weights)


# -- spatial domains --------------------------------------------------------------------------------------------


def domain_rows(context: TaskContext) -> list[TaskRow]:
    """Score clusters of features against labels, by adjusted Rand index and normalised mutual information.

    There are as many clusters as labels. Spots without a label, and spots whose label has fewer than three spots, are left
    out. Each kind of features is clustered twice: unchanged, and averaged with the mean over neighbouring spots. Measured
    expression (50 most variable genes) is a reference. The control is the cluster map after a rotation and a shift. A
    section with fewer than two labels has no rows.
    """
    rows = []
    for section in context.sections:
        labels = context.labels(section)
        known = is_labelled(labels)
        values, count = np.unique(labels[known], return_counts=True)
        known &= np.isin(labels, values[count >= MIN_PER_LABEL])
        if np.unique(labels[known]).size < 2:
            given = context.options.labels
            log.warning(
                "domains: section %s is left out: it has fewer than two labels with at least %d spots each; %s",
                section.section_id,
                MIN_PER_LABEL,
                "give labels with `labels`"
                if given is None
                else f"check that section and spot ids in {given.spec} are those of the shard set",
            )
            continue
        weights = _label_weights(context, section, labels, known)
        for name, features in _domain_features(context, section).items():
            for method, x in (
                (name, features),
                (f"{name}, smoothed", 0.5 * (features + neighbour_mean(features, section.xy_N2))),
            ):
                rows += _agreement_rows(context, section, method, labels[known], x[known], known, weights)
    return [*rows, *mean_rows(rows, context)]


def _domain_features(context: TaskContext, section: SectionInputs) -> dict[str, np.ndarray]:
    """Return features (N, F) by name: those of all encoders, the zero-shot prediction and measured expression.

    The last two are missing if the section measured none of the most variable genes.
    """
    keys = context.most_variable(section.cohort, section.number)
    found = {name: np.asarray(x, np.float64) for name, x in section.features.items()}
    if not keys:
        log.warning(
            "domains: section %s measured none of the most variable genes, so that only image features are scored",
            section.section_id,
        )
        return found
    predicted = context.predictor.predict(section.image, context.queries(keys), cohort=section.cohort)["cp10k"]
    return found | {ZERO_SHOT: predicted.astype(np.float64), "measured expression": context.values(section, keys)}


def _label_weights(context: TaskContext, section: SectionInputs, labels: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return :func:`label_weights` of the labelled spots of a section; a warning counts the draws that are left out."""
    if not len(section.weights_DN):
        return np.zeros((0, int(known.sum())))
    options, name = context.options, section.section_id
    weights, left_out = label_weights(
        section.xy_N2[known], labels[known], options.n_bootstrap, seed=options.seed, section=name
    )
    if left_out:
        log.warning(
            "domains: section %s: %d of %d draws of the bootstrap have fewer than two labels and are left out of its intervals",
            name,
            left_out,
            options.n_bootstrap,
        )
    return weights


def _agreement_rows(
    context: TaskContext,
    section: SectionInputs,
    method: str,
    labels: np.ndarray,
    x: np.ndarray,
    known: np.ndarray,
    weights_DN: np.ndarray,
) -> list[TaskRow]:
    """Return the rows of both agreement scores between the labels and the clusters of one kind of features."""
    options, found = context.options, cluster(x, np.unique(labels).size, context.options.seed)
    moved = moved_spots(section.xy_N2[known], options.n_null, seed=options.seed, section=section.section_id)
    null = [agreement(labels, found[d]) for d in moved]
    rows = []
    for metric, value in agreement(labels, found).items():
        statistic = partial(_score_of, metric, labels, found)
        low, high = resampled(statistic, weights_DN, value) if len(weights_DN) else NO_INTERVAL
        control = float(np.mean([d[metric] for d in null])) if null else NAN
        rows.append(
            TaskRow(
                "domains",
                section.section_id,
                method,
                metric,
                value,
                low,
                min(high, 1.0),  # a NaN stays NaN
                0.0 if metric == "ari" else NAN,
                control,
                len(labels),
            )
        )
    return rows


def _score_of(metric: str, labels: np.ndarray, clusters_N: np.ndarray, index: np.ndarray) -> float:
    return float(SCORES[metric](labels[index], clusters_N[index]))


# -- pairs ------------------------------------------------------------------------------------------------------


def pair_rows(context: TaskContext) -> list[TaskRow]:
    """Score the pair head: the AUC in the true context, and that AUC minus the AUC in the context of another spot.

    Wrong levels come from another spot of the section (``spots``), or from genes of similar detection in the same spot
    (``strata``), as in training. A section with fewer than two trained genes or spots has no rows.
    """
    rows = []
    for section in context.sections:
        keys = context.trained_and_measured(section.cohort, [section.number])[:TEXT_GENES]
        if len(keys) < 2 or len(section.spot_ids) < 2:
            log.warning(
                "pairs: section %s is left out: at least two spots, and two measured genes that the model was trained on, are needed, "
                "but %d such genes and %d spots can be used",
                section.section_id,
                len(keys),
                len(section.spot_ids),
            )
            continue
        sentences = SpotSentences(context.predictor, context.queries(keys), context.values(section, keys))
        for mode in ("spots", "strata"):
            rows += _pair_section(context, section, sentences, mode)
    return [*rows, *mean_rows(rows, context)]


def _pair_section(context: TaskContext, section: SectionInputs, sentences: SpotSentences, mode: str) -> list[TaskRow]:
    """Return the rows of the AUC and its gain for one section and one way of mispairing; empty if no pair can be scored."""
    rng = generator(context.options.seed, "pairs", mode, section.section_id)
    levels, paat = sentences.levels_NG, context.predictor.config.loss.paat
    wrong = _mispaired(levels, mode, paat.strata, rng)
    counted = (
        counted_swaps(levels, wrong, torch.ones_like(levels, dtype=torch.bool), paat.min_level_shift).cpu().numpy()
    )
    if not counted.any():
        log.warning(
            "pairs: section %s is left out for levels mispaired by %s: none differs from the true level by at "
            "least loss.paat.min_level_shift=%d",
            section.section_id,
            mode,
            paat.min_level_shift,
        )
        return []
    n = len(levels)
    first, second = (_derangement(n, rng) for _ in range(2))
    ranked = []
    for of in (np.arange(n), first, second):
        true, false = (sentences.pair_logits(x, section.image.vector_ND, of)[counted] for x in (levels, wrong))
        ranked.append(RankedPairs(PairScores(true, false, np.nonzero(counted)[0])))
    own, elsewhere, control = ranked
    even, weights = np.ones(n), section.weights_DN
    auc_ends = interval(np.array([own.auc(w) for w in weights]))
    gain_ends = interval(np.array([gain(own, elsewhere, w) for w in weights]))
    size = int(counted.sum())
    name, method = section.section_id, f"pair head, {mode}"
    return [
        TaskRow("pairs", name, method, "auc", own.auc(even), *auc_ends, 0.5, elsewhere.auc(even), size),
        TaskRow(
            "pairs",
            name,
            method,
            "auc_gain",
            gain(own, elsewhere, even),
            *gain_ends,
            0.0,
            gain(control, elsewhere, even),
            size,
        ),
    ]


def _mispaired(levels_NG: torch.Tensor, mode: str, n_strata: int, rng: np.random.Generator) -> torch.Tensor:
    """Return wrong levels, int64 (N, G): of other spots (``spots``), or of similarly detected genes of the spot (``strata``)."""
    shape, device = (1, *levels_NG.shape), levels_NG.device
    u, v = (upload(torch.from_numpy(rng.random(shape, np.float32)), device) for _ in range(2))
    n, G = levels_NG.shape
    if mode == "spots":
        return take_from_other_spots(levels_NG, torch.zeros(n, dtype=torch.long, device=device), u)[0]
    strata = strata_from_levels(levels_NG.cpu().numpy(), np.zeros(n, np.int64), np.ones((1, G), bool), n_strata)
    return permute_within_strata(levels_NG, upload(strata, device).expand(n, G), u, v)[0]


def _derangement(n: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random permutation of n >= 2 elements without fixed points: a single cycle."""
    order = rng.permutation(n)
    out = np.empty(n, np.int64)
    out[order] = np.roll(order, 1)
    return out


# -- gene vectors -----------------------------------------------------------------------------------------------


def gene_rows(context: TaskContext) -> list[TaskRow]:
    """Score how close the genes of a family or gene set are, and how often a gene's own orthologue is the nearest.

    All trained genes are used. The vector of a gene is its mean sentence vector over the positive levels. Counts of name
    tokens are a baseline, because families and orthologues share tokens. Gene vectors from counts are another baseline, if
    the model has gene vectors.
    """
    predictor = context.predictor
    facts = {g.key: g for g in predictor.bundle.genes}
    keys = predictor.trained_genes
    queries = [GeneQuery(facts[k].symbol, facts[k].name, k) for k in keys]
    found = {"comtip sentences": gene_vectors(predictor, queries), "name tokens": _bags(context, queries)}
    rows = []
    for method, vectors in found.items():
        rows += _closeness_rows(context, method, vectors, keys)
        rows += _orthologue_rows(context, method, vectors, keys)
    counts = predictor.vectors
    if counts is not None:
        known = [i for i, k in enumerate(keys) if k in counts.row]
        vectors = counts.vector_GK[[counts.row[keys[i]] for i in known]]
        rows += _closeness_rows(context, "gene vectors from counts", vectors, [keys[i] for i in known])
    return rows


def _closeness_rows(context: TaskContext, method: str, vectors: np.ndarray, keys: list[str]) -> list[TaskRow]:
    """Return the rows of closeness within symbol families and within the given gene sets, over pairs of one species."""
    rows, options = [], context.options
    for metric, sets in (("auc_families", families(keys)), ("auc_gene_sets", options.gene_sets)):
        close = closeness_by_species(vectors, keys, sets, options.seed)
        if close is not None:
            ends = section_interval(close.set_auc_S, options.n_bootstrap, seed=options.seed)
            n = close.set_auc_S.size
            rows.append(TaskRow("genes", "", method, metric, close.auc, *ends, 0.5, close.shuffled, n))
    return rows


def _orthologue_rows(context: TaskContext, method: str, vectors: np.ndarray, keys: list[str]) -> list[TaskRow]:
    """Return one row: the share of genes whose own orthologue is the nearest of all. Empty with fewer than three pairs."""
    index = {k: i for i, k in enumerate(keys)}
    pairs = orthologues(keys)
    if len(pairs) < MIN_PER_LABEL:
        return []
    left, right = (vectors[[index[p[side]] for p in pairs]] for side in (0, 1))
    hits = recall_at(ranks(left, right), 1)
    mixed = generator(context.options.seed, "orthologues").permutation(len(pairs))
    control = float(recall_at(ranks(left, right[mixed]), 1).mean())
    ends = section_interval(hits, context.options.n_bootstrap, seed=context.options.seed)
    n = len(pairs)
    return [TaskRow("genes", "", method, "orthologue_r1", float(hits.mean()), *ends, chance(n, 1), control, n)]


def _bags(context: TaskContext, queries: list[GeneQuery]) -> np.ndarray:
    """Return counts of name tokens, float32 (G, tokens that occur)."""
    tokens, _ = context.predictor.tokens(queries)
    ids, length = tokens.ids_GT.cpu().numpy(), tokens.length_G.cpu().numpy()
    names = [row[1 : n - 1] for row, n in zip(ids, length, strict=True)]
    used = np.unique(np.concatenate(names))
    return np.stack([np.bincount(np.searchsorted(used, row), minlength=used.size) for row in names]).astype(np.float32)
