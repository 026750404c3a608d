"""Score a model on sections: zero-shot and on unseen genes, compared with a spatial null, ridge baselines and trained methods."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from comtip_shards import ShardSet
from comtip_shards.storage.atomic import write_atomic

from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.data.tile_sources import ShardTiles
from comtip_fast.evaluation.gene_table import ScoredGenes, ScoringInputs, gene_table, resolve_list
from comtip_fast.evaluation.metrics import mean_scores
from comtip_fast.evaluation.nulls import moved_spots, null_pcc
from comtip_fast.evaluation.scoring import (
    N_HVG,
    NORMALISATIONS,
    PREDICTORS,
    UNSEEN_RIDGE,
    levels_pcc,
    score_section,
)
from comtip_fast.evaluation.seen import any_known, choose_sections, lineage_facts, readout_facts, section_facts
from comtip_fast.evaluation.train_reference import TrainReference, check_tiles, spot_inputs
from comtip_fast.evaluation.trained import METHODS, TrainOptions
from comtip_fast.evaluation.trained.fit import TrainedMethod, fit_methods
from comtip_fast.evaluation.unseen import MEAN_MAP, SHUFFLES, UnseenGenes, unseen_references
from comtip_fast.inference import GeneQuery, Predictor, SectionFeatures, SectionPrediction
from comtip_fast.lineage import symbol_of
from comtip_fast.metrics import finite_or_none, pcc_per_gene

log = logging.getLogger("comtip_fast")
HVG_FROM_LIST = "gene list"
FORMAT, VERSION = "comtip-metrics", 1


@dataclass
class SectionData:
    """Measured and predicted expression of one evaluated section, with G genes and N spots."""

    section_id: str
    cohort: str
    keys: list[str]
    """Keys of the G genes."""
    xy: np.ndarray
    """(N, 2) positions of the spots, in px of the source image."""
    measured: dict[str, np.ndarray]
    """{normalisation: measured log1p expression (N, G)}."""
    predicted: dict[str, np.ndarray]
    """{normalisation: predicted log1p expression (N, G)}."""
    hvg: np.ndarray
    """Indices into ``keys`` of the (up to) 50 most variable genes; with a gene list, of its first 50 genes."""
    panel: np.ndarray
    """Indices into ``keys`` of the trained genes; with a gene list, of all its genes."""
    unseen: np.ndarray
    """Indices into ``keys`` of the held-out genes by decreasing variance; with a gene list, of its genes that no run trained."""
    pcc: np.ndarray
    """(G,) zero-shot PCC, CP10K."""
    null_means: np.ndarray
    """(n_draws,) mean PCC of the null over the genes ``hvg``, CP10K."""
    null_pcc: np.ndarray
    """(n_draws, panel genes) float32, PCC of the null, CP10K; NaN where undefined."""
    gene_table: pd.DataFrame
    """One row per gene of ``keys``, with the columns of :data:`comtip_fast.evaluation.gene_table.COLUMNS`."""
    spots: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(N,) indices of the spots in the shard set."""
    baselines: dict[str, np.ndarray] = field(default_factory=dict)
    """{name of a baseline or trained method: its prediction for the genes ``hvg``, CP10K (N, HVG)}."""
    unseen_baselines: dict[str, np.ndarray] = field(default_factory=dict)
    """{name of a reference: its prediction for the first 50 of the genes ``unseen``, CP10K (N, H)}."""


@dataclass
class Evaluation:
    """All scores, and the data that the report plots."""

    metrics: dict[str, Any]
    sections: list[SectionData]
    shards: ShardSet
    predictor: Predictor
    trained: list[TrainedMethod] = field(default_factory=list)
    """Methods that were trained to compare the model with."""

    def gene_table(self) -> pd.DataFrame:
        """Return the scores of every gene in every section, one row each, as in ``genes.csv``.

        The columns are :data:`comtip_fast.evaluation.gene_table.COLUMNS`, plus ``pcc_NAME`` for each trained method.
        """
        return pd.concat([data.gene_table for data in self.sections], ignore_index=True)


def evaluate(
    predictor: Predictor,
    shards: ShardSet,
    *,
    sections: Sequence[str] | None = None,
    train_shards: ShardSet | None = None,
    genes: Sequence[str] | None = None,
    seed: int = 0,
    n_null: int = 200,
    train: TrainOptions | None = None,
) -> Evaluation:
    """Score a model on sections, with a spatial null, ridge baselines and, if requested, trained methods.

    Parameters
    ----------
    predictor
        The trained model.
    shards
        A shard set with tiles of the model's size.
    sections
        Section ids. Default: the sections of split ``test``, or all sections of a set without that split, except those that
        training used.
    train_shards
        The shard set with the model's training sections; default: ``shards``. The baselines are trained on the training
        sections, and the 50 most variable genes are chosen on them. A cohort that was not trained has no ridge baselines,
        and its 50 genes are chosen on the evaluated section. ``hvg_from`` records where the genes were chosen.
    genes
        Symbols or Ensembl ids of the only genes to score. The mean over all genes is then the mean over this list, and its
        first 50 genes replace the 50 most variable genes, so that models with different training genes are compared on
        the same genes.
    seed, n_null
        Seed and number of draws of the spatial null.
    train
        Methods to train on the training sections and to score; None trains none.

    Raises
    ------
    ValueError
        A section is unknown or measured none of the genes, all sections were used in training, tiles have another size,
        ``train_shards`` lacks the training sections of an evaluated cohort, a listed gene is unknown or listed twice, or a method
        is unknown, cannot be trained or was stopped by a signal.
    FileNotFoundError
        A method to train starts from a file of weights that does not exist.
    """
    train_shards = shards if train_shards is None else train_shards
    check_tiles(predictor, shards, train_shards)
    chosen = choose_sections(predictor, shards, sections)
    reference = TrainReference(predictor, train_shards)
    reference.check(shards.cohort_of_section(n) for n in chosen)
    scored = [_choose_genes(predictor, shards, n, reference, genes) for n in chosen]  # before the slow work
    targets = {g.keys[i] for g in scored for i in np.union1d(g.panel, g.hvg).tolist()}
    trained = fit_methods(train or TrainOptions(), predictor, reference, sorted(targets))
    results: dict[str, dict[str, Any]] = {}
    data: list[SectionData] = []
    for number, scored_genes in zip(chosen, scored, strict=True):
        section_id = shards.manifest.sections[number].section_id
        log.info("evaluating section %s (%d of %d)", section_id, len(data) + 1, len(chosen))
        section_data, metrics = _evaluate_section(
            predictor, shards, number, scored_genes, reference, seed, n_null, trained
        )
        data.append(section_data)
        results[section_id] = metrics
    cohorts = {
        c: _merge_sections([results[d.section_id] for d in data if d.cohort == c])
        for c in sorted({d.cohort for d in data})
    }
    all_metrics = {
        "format": FORMAT,
        "version": VERSION,
        "run": predictor.config.name,
        "seed": seed,
        "null_draws": n_null,
        "shuffled_draws": SHUFFLES,
        "gene_list": None if genes is None else list(genes),
        "lineage": lineage_facts(predictor),
        "readout": readout_facts(predictor),
        "reference_sections": [train_shards.manifest.sections[n].section_id for n in reference.numbers],
        "trained_methods": {m.name: m.facts for m in trained},
        "cohorts": cohorts,
        "sections": results,
    }
    return Evaluation(all_metrics, data, shards, predictor, trained)


def _choose_genes(
    predictor: Predictor, shards: ShardSet, number: int, reference: TrainReference, listed: Sequence[str] | None
) -> ScoredGenes:
    """Choose the genes to score in a section, from the model or from a list; raise ValueError if the section measured none."""
    if listed is not None:
        keys, not_measured = resolve_list(listed, shards, number)
        new = np.array([i for i, k in enumerate(keys) if symbol_of(k) not in predictor.trained_symbols], np.int64)
        every = np.arange(len(keys))
        return ScoredGenes(keys, every[:N_HVG], every, new, HVG_FROM_LIST, not_measured)
    measured = {g.key for g, m in zip(shards.genes, shards.measured(number), strict=True) if m}
    ranked, hvg_from = reference.ranked_genes(shards.cohort_of_section(number), fallback=(shards, number))
    hvg = [k for k in ranked if k in measured][:N_HVG]
    panel = [k for k in predictor.trained_genes if k in measured]
    unseen = [k for k in predictor.held_out_genes if k in measured]
    keys = list(dict.fromkeys([*hvg, *panel, *unseen]))
    if not keys:
        section_id = shards.manifest.sections[number].section_id
        raise ValueError(
            f"{shards.name}: section {section_id} measured none of the model's genes; name other sections with `sections`, or "
            "genes that it measured with `genes`"
        )
    index, rank = {k: i for i, k in enumerate(keys)}, {k: i for i, k in enumerate(ranked)}
    unseen.sort(key=lambda k: (rank.get(k, len(ranked)), index[k]))
    hvg_i, panel_i, unseen_i = (np.array([index[k] for k in group], np.int64) for group in (hvg, panel, unseen))
    return ScoredGenes(keys, hvg_i, panel_i, unseen_i, hvg_from, [])


def _evaluate_section(
    predictor: Predictor,
    shards: ShardSet,
    number: int,
    genes: ScoredGenes,
    reference: TrainReference,
    seed: int,
    n_null: int,
    trained: Sequence[TrainedMethod],
) -> tuple[SectionData, dict[str, Any]]:
    """Predict and score one section; return its data and its entry of ``metrics.json``."""
    section_id, cohort = shards.manifest.sections[number].section_id, shards.cohort_of_section(number)
    spots = shards.select(sections=[number])
    tiles, stain, counts = ShardTiles(shards, spots), shards.stain(number), shards.counts(spots)
    xy = shards.spots.loc[spots, ["x_px", "y_px"]].to_numpy(float)
    row_of = {g.key: i for i, g in enumerate(shards.genes)}
    rows = [row_of[k] for k in genes.keys]
    measured = {
        "cp10k": log1p_cp10k(counts)[:, rows].toarray().astype(np.float64),
        "raw": np.log1p(counts[:, rows].toarray().astype(np.float64)),
    }
    queries = [GeneQuery(shards.genes[r].symbol, shards.genes[r].name, shards.genes[r].key) for r in rows]
    moved = moved_spots(xy, n_null, seed=seed, section=section_id)
    with SectionFeatures(predictor, tiles, stain) as features:
        predicted = SectionPrediction(predictor, queries, cohort).predict_all(features.stored, len(xy), xy)
        ridge_inputs = spot_inputs(predictor, tiles, stain, features.pooled, features.frozen)
        colour = ridge_inputs["ridge_colour"]["tile colour"].read(np.arange(len(xy)))
        covariates = np.column_stack([colour, np.log1p(np.asarray(counts.sum(axis=1)).ravel())])
        inputs = ScoringInputs(
            cohort=cohort,
            genes=genes,
            measured=measured,
            predicted=predicted,
            from_levels=levels_pcc(predictor, features, queries, measured, genes.hvg, covariates),
            covariates=covariates,
            ridge_inputs=ridge_inputs,
            moved=moved,
            null=null_pcc(measured["cp10k"], predicted["cp10k"], moved),
            trained={m.name: m.predict(tiles, stain, cohort, genes.keys) for m in trained if cohort in m.cohorts},
        )
        unseen = _unseen_genes(predictor, shards, number, inputs, features, xy, queries, seed)
        inputs.unseen_references, mean = unseen_references(unseen) if genes.unseen.size else ({}, None)
        if mean is not None:
            inputs.unseen_baselines[MEAN_MAP] = np.repeat(mean["cp10k"], unseen.n_top, axis=1)
        scores, null_means, null_genes = score_section(inputs, reference)
    data = SectionData(
        section_id=section_id,
        cohort=cohort,
        keys=genes.keys,
        xy=xy,
        measured=measured,
        predicted=predicted,
        hvg=genes.hvg,
        panel=genes.panel,
        unseen=genes.unseen,
        pcc=pcc_per_gene(measured["cp10k"], predicted["cp10k"]),
        null_means=null_means,
        null_pcc=null_genes,
        gene_table=gene_table(predictor, shards, number, inputs),
        spots=spots,
        baselines=inputs.baselines,
        unseen_baselines=inputs.unseen_baselines,
    )
    return data, _section_facts(predictor, shards, number, genes) | scores


def _unseen_genes(
    predictor: Predictor,
    shards: ShardSet,
    number: int,
    v: ScoringInputs,
    features: SectionFeatures,
    xy: np.ndarray,
    queries: list[GeneQuery],
    seed: int,
) -> UnseenGenes:
    """Return the unseen genes of a section, with the trained genes that it measured, for their references."""
    trained = set(predictor.trained_genes)
    seen = [g for g, m in zip(shards.genes, shards.measured(number), strict=True) if m and g.key in trained]
    return UnseenGenes(
        predictor=predictor,
        features=features,
        section_id=shards.manifest.sections[number].section_id,
        cohort=v.cohort,
        xy=xy,
        queries=queries,
        unseen=v.genes.unseen,
        seen=[GeneQuery(g.symbol, g.name, g.key) for g in seen],
        measured=v.measured,
        predicted=v.predicted,
        covariates=v.covariates,
        n_top=min(N_HVG, v.genes.unseen.size),
        seed=seed,
    )


def _section_facts(predictor: Predictor, shards: ShardSet, number: int, genes: ScoredGenes) -> dict[str, Any]:
    """Return the record of a section in ``metrics.json`` without its scores."""
    meta = shards.manifest.sections[number]
    return {
        "sections": [meta.section_id],
        "n_spots": meta.n_spots,
        "n_genes_all": int(genes.panel.size),
        "n_genes_unseen": int(genes.unseen.size),
        "n_genes_scored": int(np.union1d(genes.panel, genes.hvg).size),
        "genes_50_hvg": [genes.keys[i] for i in genes.hvg],
        "hvg_from": genes.hvg_from,
        "genes_not_measured": genes.not_measured,
    } | section_facts(predictor, shards, number)


def _merge_sections(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the entry of a cohort: mean scores, sums of spots and undefined genes, and the most variable genes of its sections.

    ``genes_50_hvg`` has the genes of every section, each once. They are more than 50 if sections measured different genes. ``genes`` of a
    method counts the genes of all sections, also of those in which it knows none and has no score.
    """
    out: dict[str, Any] = {
        "sections": [s for p in parts for s in p["sections"]],
        "n_spots": sum(p["n_spots"] for p in parts),
        "genes_50_hvg": list(dict.fromkeys(key for p in parts for key in p["genes_50_hvg"])),
        "hvg_from": parts[0]["hvg_from"],
        "readout_heads": parts[0]["readout_heads"],
        "donor_seen_in_training": any_known([p["donor_seen_in_training"] for p in parts]),
        "donor_seen_by": list(dict.fromkeys(run for p in parts for run in p["donor_seen_by"])),
        "platforms_not_in_training": sorted({p["platform"] for p in parts if p["platform_seen_in_training"] is False}),
        "genes_not_measured": sorted({g for p in parts for g in p["genes_not_measured"]}),
    }
    for name in predictors_of(*parts):
        out[name] = {}
        for norm in NORMALISATIONS:
            scores = [p[name][norm] for p in parts if p.get(name, {}).get(norm) is not None]
            out[name][norm] = mean_scores(scores) if scores else None
            if scores:
                out[name][norm] |= _sums(scores)
                if "genes" in scores[0]:
                    # Otherwise the mean over fewer sections than the model's would look like one over the same genes.
                    unscored = [p for p in parts if p.get(name, {}).get(norm) is None]
                    out[name][norm]["genes"] += sum(
                        p["n_genes_unseen" if name == UNSEEN_RIDGE else "n_genes_scored"] for p in unscored
                    )
    return out


def _sums(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the entries of a cohort's scores that are not means: sums of genes, and the model's mean on the fitted genes.

    The model's mean is over the sections in which the method was scored.
    """
    totals = ("undefined_genes", "genes", "fitted_genes", "fitted_50_hvg")
    out: dict[str, Any] = {key: sum(s[key] for s in scores) for key in totals if key in scores[0]}
    if "model_on_fitted" in scores[0]:
        of_model = [s["model_on_fitted"] for s in scores]
        out["model_on_fitted"] = mean_scores(of_model) | _sums(of_model)
    return out


def predictors_of(*entries: dict[str, Any]) -> list[str]:
    """Return all :data:`PREDICTORS`, then the trained methods that occur in at least one of the entries of ``metrics.json``."""
    return [*PREDICTORS, *(name for name in METHODS if any(name in e for e in entries))]


def write_metrics(metrics: dict[str, Any], path: Path) -> None:
    """Write ``metrics.json``; numbers that are not finite become null."""
    write_atomic(path, json.dumps(finite_or_none(metrics), indent=1, allow_nan=False) + "\n")
