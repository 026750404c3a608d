"""Score a model on sections: zero-shot, on genes it never saw, beside a spatial null and two ridge baselines."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from comtip_shards import ShardSet
from comtip_shards.storage.atomic import write_atomic

from comtip_fast.data.expression.levels import log1p_cp10k
from comtip_fast.evaluation.metrics import Score, from_genes, pcc_per_gene, score
from comtip_fast.evaluation.nulls import moved_spots, null_partial_pcc, null_pcc
from comtip_fast.evaluation.train_reference import Inputs, TrainReference, mean_colour, spot_inputs
from comtip_fast.inference import GeneQuery, Predictor

log = logging.getLogger("comtip_fast")
N_HVG = 50
NORMALISATIONS = ("cp10k", "raw")
PREDICTORS = ("zero_shot", "zero_shot_unseen_genes", "control_null", "ridge_colour", "ridge_features")
FORMAT, VERSION = "comtip-metrics", 1


@dataclass
class SectionData:
    """One evaluated section: what was measured, what was predicted, where."""

    section_id: str
    cohort: str
    keys: list[str]
    xy: np.ndarray
    """(N, 2) px of the source image."""
    measured: dict[str, np.ndarray]
    """Per normalisation (N, G)."""
    predicted: dict[str, np.ndarray]
    hvg: np.ndarray
    """Positions of the 50 most variable genes in ``keys``; likewise the next two."""
    panel: np.ndarray
    unseen: np.ndarray
    pcc: np.ndarray
    """(G,) zero-shot, CP10K."""
    null_means: np.ndarray
    """(n_draws,) mean PCC over the 50 genes, CP10K."""
    null_pcc: np.ndarray
    """(n_draws, panel genes) float32, CP10K; NaN where undefined."""


@dataclass
class Evaluation:
    """All scores, and the arrays that the report draws."""

    metrics: dict[str, Any]
    sections: list[SectionData]
    shards: ShardSet
    predictor: Predictor


def evaluate(
    predictor: Predictor,
    shards: ShardSet,
    *,
    sections: Sequence[str] | None = None,
    train_shards: ShardSet | None = None,
    seed: int = 0,
    n_null: int = 200,
) -> Evaluation:
    """Score a model.

    Parameters
    ----------
    predictor
        The trained model.
    shards
        A shard set with tiles of the model's size.
    sections
        Section ids; default: those whose split is ``test``, else all that training did not use.
    train_shards
        The set with the model's training sections: the baselines learn from it, and the 50 most variable genes
        are chosen on it, never on what is evaluated. Default: ``shards``. A cohort that was never trained has no
        ridge, and its 50 genes are chosen on the evaluated section itself, flagged by ``hvg_from``.
    seed, n_null
        Of the spatial null.

    Raises
    ------
    ValueError
        Sections unknown or all used in training, tiles of another size, a trained cohort without its training
        sections in ``train_shards``.
    """
    train_shards = shards if train_shards is None else train_shards
    _check_tiles(predictor, shards)
    _check_tiles(predictor, train_shards)
    chosen = choose_sections(predictor, shards, sections)
    reference = TrainReference(predictor, train_shards)
    reference.check(shards.cohort_of_section(n) for n in chosen)
    results: dict[str, dict[str, Any]] = {}
    data: list[SectionData] = []
    for number in chosen:
        section_id = shards.manifest.sections[number].section_id
        log.info("evaluating %s (%d of %d)", section_id, len(data) + 1, len(chosen))
        one, metrics = _evaluate_section(predictor, shards, number, reference, seed, n_null)
        data.append(one)
        results[section_id] = metrics
    cohorts = {
        t: _merge([results[d.section_id] for d in data if d.cohort == t]) for t in sorted({d.cohort for d in data})
    }
    whole = {
        "format": FORMAT,
        "version": VERSION,
        "run": predictor.config.name,
        "seed": seed,
        "null_draws": n_null,
        "cohorts": cohorts,
        "sections": results,
    }
    return Evaluation(whole, data, shards, predictor)


def choose_sections(predictor: Predictor, shards: ShardSet, wanted: Sequence[str] | None) -> list[int]:
    """Return section numbers: those asked for, else ``test``, else all that training did not use."""
    if wanted is not None:
        return [shards.section_number(s) for s in wanted]
    entries = list(enumerate(shards.manifest.sections))
    test = [i for i, s in entries if s.split == "test"]
    used = {s["section_id"] for s in predictor.train_sections if s["split"] in ("train", "val")}
    rest = test or [i for i, s in entries if s.section_id not in used]
    if not rest:
        raise ValueError(f"{shards.path}: every section was used in training; name some with --sections to score them")
    return rest


def _check_tiles(predictor: Predictor, shards: ShardSet) -> None:
    made, model = shards.manifest.tile, (predictor.tile_px, predictor.tile_um, predictor.min_mpp)
    if (made.px, made.um, made.min_mpp) != model:
        raise ValueError(
            f"{shards.path}: tiles of {made.um:g} um in {made.px} px at {made.min_mpp:g} um/px, the model reads {model[1]:g} um "
            f"in {model[0]} px at {model[2]:g}; build with --tile-um {model[1]:g} --tile-px {model[0]} --min-mpp {model[2]:g}"
        )


def _evaluate_section(
    predictor: Predictor, shards: ShardSet, number: int, reference: TrainReference, seed: int, n_null: int
) -> tuple[SectionData, dict[str, Any]]:
    meta, cohort = shards.manifest.sections[number], shards.cohort_of_section(number)
    spots = shards.select(sections=[number])
    tiles, stain, counts = shards.tiles(spots), shards.stain(number), shards.counts(spots)
    features = predictor.image_features(tiles.transpose(0, 3, 1, 2), stain)
    known = {g.key for g, m in zip(shards.genes, shards.measured(number), strict=True) if m}
    ranked, hvg_from = reference.ranked_genes(cohort, fallback=(shards, number))
    hvg_keys = [k for k in ranked if k in known][:N_HVG]
    panel_keys = [k for k in predictor.trained_genes if k in known]
    unseen_keys = [k for k in predictor.held_out_genes if k in known]
    keys = list(dict.fromkeys([*hvg_keys, *panel_keys, *unseen_keys]))
    if not keys:
        raise ValueError(f"{shards.path}: {meta.section_id} measured no gene that can be scored")
    place = {k: i for i, k in enumerate(keys)}
    hvg, panel, unseen = (np.array([place[k] for k in some], np.int64) for some in (hvg_keys, panel_keys, unseen_keys))
    row_of = {g.key: i for i, g in enumerate(shards.genes)}
    rows = [row_of[k] for k in keys]
    measured = {
        "cp10k": log1p_cp10k(counts)[:, rows].toarray().astype(np.float64),
        "raw": np.log1p(counts[:, rows].toarray().astype(np.float64)),
    }
    queries = [GeneQuery(shards.genes[r].symbol, shards.genes[r].name, k) for r, k in zip(rows, keys, strict=True)]
    predicted = predictor.predict(features, queries)
    xy = shards.spots.loc[spots, ["x_px", "y_px"]].to_numpy(float)
    view = _View(
        cohort,
        keys,
        measured,
        predicted,
        hvg,
        panel,
        np.union1d(panel, hvg),
        _by_variance(unseen, ranked, keys),
        np.column_stack([mean_colour(tiles), np.log1p(np.asarray(counts.sum(axis=1)).ravel())]),
        spot_inputs(predictor, tiles, stain, features.pooled_Nd),
        moved_spots(xy, n_null, seed=seed, section=meta.section_id),
    )
    scores, null_means, null_genes = _score_section(view, reference)
    train = [s for s in predictor.train_sections if s["split"] == "train"]
    splits = {s["section_id"]: s["split"] for s in predictor.train_sections}
    facts = {
        "sections": [meta.section_id],
        "donor": meta.donor,
        "n_spots": int(spots.size),
        "n_genes_all": int(panel.size),
        "n_genes_unseen": len(unseen_keys),
        "genes_50_hvg": hvg_keys,
        "hvg_from": hvg_from,
        "donor_seen_in_training": meta.donor in {s["donor"] for s in train},
        "section_seen_in_training": splits.get(meta.section_id) == "train",
        "section_stopped_training": splits.get(meta.section_id) == "val",
    }
    pcc = pcc_per_gene(measured["cp10k"], predicted["cp10k"])
    data = SectionData(
        meta.section_id, cohort, keys, xy, measured, predicted, hvg, panel, view.unseen, pcc, null_means, null_genes
    )
    return data, facts | scores


@dataclass
class _View:
    """One section, ready to be scored; genes by position in ``keys``."""

    cohort: str
    keys: list[str]
    measured: dict[str, np.ndarray]
    predicted: dict[str, np.ndarray]
    hvg: np.ndarray
    panel: np.ndarray
    all: np.ndarray
    """Panel genes and the most variable ones (which may be held out by name), ascending."""
    unseen: np.ndarray
    """By falling variance."""
    covariates: np.ndarray
    inputs: Inputs
    moved: np.ndarray


def _score_section(v: _View, reference: TrainReference) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Return all scores, and of the null under CP10K: the mean of each draw, the PCC of each panel gene."""
    out: dict[str, Any] = {name: {} for name in PREDICTORS}
    top, panel = np.searchsorted(v.all, v.hvg), np.searchsorted(v.all, v.panel)
    first_unseen = np.arange(min(N_HVG, v.unseen.size))
    keys, kept = [v.keys[i] for i in v.all], (np.zeros(0), np.zeros((0, 0), np.float32))
    for norm in NORMALISATIONS:
        m, p = v.measured[norm], v.predicted[norm]
        own = score(m[:, v.all], p[:, v.all], v.covariates, top, panel)
        out["zero_shot"][norm] = asdict(own)
        out["zero_shot_unseen_genes"][norm] = asdict(score(m[:, v.unseen], p[:, v.unseen], v.covariates, first_unseen))
        genes = null_pcc(m[:, v.all], p[:, v.all], v.moved)
        partial = null_partial_pcc(m[:, v.hvg], p[:, v.hvg], v.covariates, v.moved)
        scores = [from_genes(g, h, top, panel) for g, h in zip(genes, partial, strict=True)]
        draws = np.array([s.mean_pcc_50_hvg for s in scores if s.mean_pcc_50_hvg is not None])
        observed = own.mean_pcc_50_hvg
        out["control_null"][norm] = _mean_scores([asdict(s) for s in scores]) | {
            "p95_mean_pcc_50_hvg": float(np.quantile(draws, 0.95)) if draws.size else None,
            "p_value": None if observed is None else float((1 + (draws >= observed).sum()) / (1 + draws.size)),
        }
        kept = (draws, genes[:, panel].astype(np.float32)) if norm == "cp10k" else kept
        for name, x in v.inputs.items():
            fitted = reference.ridge(v.cohort, name, norm, keys, x)
            out[name][norm] = None
            if fitted is not None:
                out[name][norm] = asdict(score(m[:, v.all], fitted[0], v.covariates, top, panel)) | fitted[1]
    return out, *kept


def _by_variance(rows: np.ndarray, ranked: list[str], keys: list[str]) -> np.ndarray:
    order = {k: i for i, k in enumerate(ranked)}
    return np.array(sorted(rows.tolist(), key=lambda i: (order.get(keys[i], 1 << 40), i)), np.int64)


def _mean_scores(scores: list[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key in Score.__dataclass_fields__:
        values = [s[key] for s in scores if s[key] is not None]
        out[key] = (
            (float(np.mean(values)) if values else None)
            if key != "undefined_genes"
            else round(float(np.mean(values or [0])))
        )
    return out


def _merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a cohort's scores: the mean over its sections (undefined genes: the sum)."""
    out: dict[str, Any] = {
        "sections": [s for p in parts for s in p["sections"]],
        "n_spots": sum(p["n_spots"] for p in parts),
        "genes_50_hvg": parts[0]["genes_50_hvg"],
        "hvg_from": parts[0]["hvg_from"],
        "donor_seen_in_training": any(p["donor_seen_in_training"] for p in parts),
    }
    for name in PREDICTORS:
        out[name] = {}
        for norm in NORMALISATIONS:
            scores = [p[name][norm] for p in parts if p[name].get(norm) is not None]
            out[name][norm] = _mean_scores(scores) if scores else None
            if scores:
                out[name][norm]["undefined_genes"] = sum(s["undefined_genes"] for s in scores)
    return out


def write_metrics(metrics: dict[str, Any], path: Path) -> None:
    """Write ``metrics.json``; what is not a finite number becomes null."""
    write_atomic(path, json.dumps(_finite(metrics), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary_table(metrics: dict[str, Any]) -> str:
    """Return the main scores as a table of text."""
    lines = [f"{'cohort':<28}{'predictor':<24}{'50 HVG':>8}{'all':>8}{'partial':>9}   (mean PCC, log1p CP10K)"]
    for cohort, entry in metrics["cohorts"].items():
        for name in PREDICTORS:
            s = entry[name]["cp10k"]
            if s is not None:
                cells = [s["mean_pcc_50_hvg"], s["mean_pcc_all"], s["partial_pcc_50_hvg"]]
                text = [f"{c:.3f}" if c is not None else "-" for c in cells]
                lines.append(f"{cohort:<28}{name:<24}{text[0]:>8}{text[1]:>8}{text[2]:>9}")
    return "\n".join(lines)
