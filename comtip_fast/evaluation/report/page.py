"""Write ``report.html``, one self-contained page for readers without a machine-learning background."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from comtip_shards.sections.splits import donor_name
from comtip_shards.storage.atomic import write_atomic
from jinja2 import Environment, PackageLoader, select_autoescape

from comtip_fast._version import __version__
from comtip_fast.drawing import GROUPS
from comtip_fast.evaluation import figures
from comtip_fast.evaluation.evaluate import Evaluation, SectionData, predictors_of
from comtip_fast.evaluation.report import charts
from comtip_fast.evaluation.report.payload import page_json, section_payload
from comtip_fast.evaluation.report.summaries import (
    all_intervals,
    calibration_rows,
    clusters,
    intervals,
    mean_intervals,
    ranked_genes,
)
from comtip_fast.evaluation.report.tables import CALIBRATION, CLUSTERS, INTERVALS, SCORES, score_table, write_tables
from comtip_fast.evaluation.scoring import UNSEEN
from comtip_fast.lineage import LineageSection, same_sections

LABELS = {
    "zero_shot": "CoMTIP, zero-shot",
    "zero_shot_levels": "CoMTIP, from level sentences alone (no readout)",
    "zero_shot_unseen_genes": "CoMTIP, unseen genes",
    "unseen_mean_map": "Unseen genes: mean map of the trained genes, the same for every gene",
    "unseen_names_shuffled": "Unseen genes, control: each with the name of another",
    "unseen_vectors_shuffled": "Unseen genes, control: each with the gene vector of another",
    "unseen_ridge": "Unseen genes: ridge on image features, trained on these genes (supervised)",
    "control_null": "Null: rotated and shifted predictions",
    "ridge_colour": "Ridge on mean tile colour (supervised)",
    "ridge_features": "Ridge on the image encoder's features (supervised)",
    "ridge_frozen": "Ridge on the frozen stem's features, mean and standard deviation (supervised)",
    "finetune": "CoMTIP, fine-tuned on the training sections (supervised)",
    "supervised": "Regression trained from initial weights (supervised)",
    "bleep": "BLEEP-like: mean of the nearest training spots (supervised)",
}
BLOCKS = {"vector": "the encoder's vector", "frozen": "the frozen stem's features"}
KINDS = {
    "kernel": "kernel ridge regression",
    "linear": "ridge regression",
    "kernel and linear": "kernel ridge regression with a linear correction",
}
"""Descriptions of the heads of the readout."""
BASELINES = ("ridge_colour", "ridge_features", "ridge_frozen", "supervised", "bleep")
"""Supervised methods other than this model; a card of the page shows the best of them."""
SHOWN_GENES = "the four best, the median and the worst predicted of the 50 most variable genes"
SHOWN_UNSEEN = "the two best and the median predicted of the (up to 50) most variable held-out genes"
STATIC_BYTES = 3 << 19
"""Budget for the images for print and for readers without JavaScript, 1.5 MiB; once it is used, no section gets more images."""


def write_report(run_dir: Path | None, result: Evaluation, out: Path) -> None:
    """Write the report, and its tables as CSV next to it.

    Parameters
    ----------
    run_dir
        Run folder with ``metrics.jsonl``, for the loss curves; None for an export.
    result
        From :func:`comtip_fast.evaluation.evaluate.evaluate`.
    out
        The file to write. Its folder also gets ``scores.csv``, ``intervals.csv``, ``calibration.csv`` and, if a section has
        enough labelled spots, ``clusters.csv``.
    """
    env = Environment(
        loader=PackageLoader("comtip_fast.evaluation.report", "templates"),
        autoescape=select_autoescape(["html", "j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["num"] = _number
    static = _StaticImages(STATIC_BYTES)
    sections = {d.section_id: _section(result, d, static) for d in result.sections}
    tables = {
        SCORES: score_table(result),
        INTERVALS: _joined(all_intervals([(d.cohort, sections[d.section_id]["intervals"]) for d in result.sections])),
        CALIBRATION: pd.concat([s["calibration"] for s in sections.values()], ignore_index=True),
        CLUSTERS: _joined([s["clusters"][0].drop(columns="row") for s in sections.values() if s["clusters"]]),
    }
    page = env.get_template("report.html.j2").render(
        name=result.predictor.config.name,
        version=__version__,
        date=datetime.datetime.now().astimezone().date().isoformat(),
        metrics=result.metrics,
        labels=LABELS,
        models=("zero_shot", UNSEEN),
        predictors=predictors_of(*result.metrics["cohorts"].values()),
        trained=result.metrics["trained_methods"],
        cohorts=_cohorts(result, sections),
        sections=list(sections.values()),
        data=page_json([s["payload"] for s in sections.values()]),
        curves=charts.loss_curves(run_dir / "metrics.jsonl") if run_dir is not None else [],
        training=_training(result),
        tables=["genes.csv", *write_tables(tables, out.parent)],
        shown_genes=SHOWN_GENES,
        shown_unseen=SHOWN_UNSEEN,
        groups=GROUPS,
    )
    write_atomic(out, page)


def _number(value: float | None) -> str:
    """Return a score with three decimals, or a dash if the score is undefined."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value + 0.0:.3f}".replace("-0.000", "0.000")


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _training(result: Evaluation) -> dict[str, Any]:
    """Return the page's data about training: runs and their sections, numbers of genes and spots, credits, encoder and tiles."""
    predictor = result.predictor
    lineage = predictor.lineage
    merged = lineage.merged_sections()
    sections = [asdict(section) for section in merged]
    donors = {donor_name(s["donor"]) for s in sections if s["split"] == "train"} - {""}
    manifest = {s.section_id: s for s in result.shards.manifest.sections}
    scored = [manifest[d.section_id] for d in result.sections]
    same = same_sections([LineageSection.of(s) for s in scored], merged)
    rows = [s | {"scored": any(j == row for _, j in same)} for row, s in enumerate(sections)]
    order = {"train": 0, "val": 1, "test": 2, "": 3}
    not_in_training_set = [
        {
            k: getattr(s, k)
            for k in ("section_id", "species", "tissue", "donor", "platform", "n_spots", "licence", "attribution")
        }
        | {"split": "not in the training set", "scored": True}
        for i, s in enumerate(scored)
        if not any(i == section for section, _ in same)
    ]
    return {
        "rows": sorted(rows, key=lambda s: (s["species"], order[s["split"]], s["section_id"])) + not_in_training_set,
        "shared_val": [s["section_id"] for s in sections if s["split"] == "val" and donor_name(s["donor"]) in donors],
        "runs": lineage.labels(),
        "parents_known": lineage.parents_known,
        "vectors": [
            (n, r.vectors) for n, r in zip(lineage.labels(), lineage.runs, strict=True) if r.vectors is not None
        ],
        "n_trained": len(predictor.trained_genes),
        "n_held_out": len(predictor.held_out_genes),
        "n_spots": sum(s["n_spots"] for s in sections if s["split"] == "train"),
        "credits": [
            (credit, [s["section_id"] for s in rows + not_in_training_set if s["attribution"] == credit])
            for credit in sorted({s["attribution"] for s in rows + not_in_training_set if s["attribution"]})
        ],
        "backbone": predictor.config.vision.backbone,
        "stem": predictor.config.vision.stem,
        "tile_um": predictor.tile_um,
        "tile_px": predictor.tile_px,
    }


def _cohorts(result: Evaluation, sections: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the page's data of every cohort: scores, sections and bars."""
    out = []
    for cohort, entry in result.metrics["cohorts"].items():
        own = [sections[d.section_id] for d in result.sections if d.cohort == cohort]
        title = cohort.replace("_", " ")
        # A bar is the mean over the sections: with several, its whisker is that of a bootstrap over sections.
        tables = [s["intervals"] for s in own]
        spans = tables[0] if len(own) == 1 else mean_intervals(tables, cohort)
        out.append(
            {
                "title": title,
                "entry": entry,
                "donor": _donor(result, [s["meta"].donor for s in own], entry["donor_seen_in_training"]),
                "sections": own,
                "readout": _readout(result.metrics["readout"], entry["readout_heads"]),
                "baseline": best_baseline(entry),
                "ridge_colour": _input_of(own[0]["metrics"]["ridge_colour"]),
                "bars": charts.score_bars(entry, spans, title),
            }
        )
    return out


def _readout(described: dict[str, Any] | None, heads: list[str]) -> str:
    """Return what predicts a cohort: the heads of the readout on each block of features, and the level sentences.

    log1p raw counts are stated apart if their heads differ from those of log1p CP10K.
    """
    if described is None or not heads:
        return "level sentences alone"
    cp10k, raw = (_mixture(described, heads, norm) for norm in ("cp10k", "raw"))
    return cp10k if raw == cp10k else f"log1p CP10K by {cp10k}; log1p raw counts by {raw}"


def _mixture(described: dict[str, Any], heads: list[str], norm: str) -> str:
    """Return what predicts one normalisation of counts, with the weights."""
    parts = []
    for cohort in heads:
        head = described[cohort]
        of_block = [
            f"{KINDS[found[norm]['kind']]} on {BLOCKS[block]} ({found[norm]['weight']:.2f})"
            for block, found in head.items()
            if block != "levels" and found[norm]["weight"] > 0
        ]
        text = ", ".join([*of_block, f"level sentences ({head['levels']:.2f})"])
        parts.append(text if len(heads) == 1 else f"{cohort.replace('_', ' ')}: {text}")
    return parts[0] if len(parts) == 1 else f"mean over the heads of {len(parts)} tissues: {'; '.join(parts)}"


def _donor(result: Evaluation, donors: list[str], seen: bool | None) -> tuple[str, str]:
    """Return what is known about the donors of the scored sections, for a card and for a sentence."""
    if seen is not None:
        if seen:
            return "donor in the training set", "from a donor in the training set"
        return "donor not in the training set", "from a donor that is not in the training set"
    trained = [s.donor for run in result.predictor.lineage.runs for s in run.sections if s.split == "train"]
    if all(donor_name(donor) for donor in (*donors, *trained)):  # the parents are unknown
        return "donor not in the known training sets", "from a donor that is not in the known training sets"
    whose = "of the scored sections" if not all(donor_name(d) for d in donors) else "of some training sections"
    return (
        "unknown whether the donor is in the training set",
        f"and it is unknown whether their donor is in the training set, because the donor {whose} is not stated",
    )


def best_baseline(entry: dict[str, Any]) -> tuple[str, float] | None:
    """Return (label, mean PCC over the 50 genes) of a cohort's best method of :data:`BASELINES`; None if none was scored."""
    scores = {name: (entry.get(name) or {}).get("cp10k") for name in BASELINES}
    found = [(s["mean_pcc_50_hvg"], name, s) for name, s in scores.items() if s and s["mean_pcc_50_hvg"] is not None]
    if not found:
        return None
    score, name, entry_of = max(found, key=lambda one: one[:2])
    return LABELS[name] + _on_part(entry_of), score


def _on_part(scores: dict[str, Any]) -> str:
    """Return the words for a method that knows only some of the genes; empty text otherwise."""
    if scores.get("fitted_genes", 0) == scores.get("genes", 0):
        return ""
    of_model = _number(scores["model_on_fitted"]["mean_pcc_50_hvg"])
    return f", on the {scores['fitted_50_hvg']} of these genes that were measured in training (CoMTIP on these: {of_model})"


def _input_of(scores: dict[str, Any]) -> str | None:
    """Return the input that was chosen for a ridge baseline; None if the baseline was not fitted."""
    return scores["cp10k"]["input"] if scores.get("cp10k") else None


class _StaticImages:
    """Draws images of example genes, one per gene so that a page break does not cut them, until ``budget`` bytes are used."""

    def __init__(self, budget: int) -> None:
        self.left = budget

    def draw(self, result: Evaluation, data: SectionData, indices: list[int]) -> list[tuple[str, str]]:
        """Return (symbol, data URI) of the genes ``indices`` in their order; of fewer or none once the budget is used up."""
        number = result.shards.section_number(data.section_id)
        meta = result.shards.manifest.sections[number]
        overview, mpp = result.shards.overview(number)
        symbols, out = data.gene_table["gene"].tolist(), []
        for i in indices:
            if self.left <= 0:
                break
            measured, predicted = data.measured["cp10k"][:, i], data.predicted["cp10k"][:, i]
            gene = (symbols[i], measured, predicted, float(data.pcc[i]))
            uri = figures.maps(overview, mpp, meta.mpp, data.xy, meta.spot_diameter_um, [gene])
            self.left -= len(uri)
            out.append((symbols[i], uri))
        return out


def _section(result: Evaluation, data: SectionData, static: _StaticImages) -> dict[str, Any]:
    """Return the page's data of one section: scores, maps, charts and tables."""
    number = result.shards.section_number(data.section_id)
    found = clusters(result, data)
    calibration, slopes = calibration_rows(data)
    payload = section_payload(result, data, found[0] if found else None, len(result.sections))
    examples, unseen = _examples(data), _unseen_examples(data)
    title = f"{data.section_id}: {data.panel.size} panel genes"
    return {
        "id": data.section_id,
        "meta": result.shards.manifest.sections[number],
        "metrics": result.metrics["sections"][data.section_id],
        "payload": payload,
        "n_spots": len(data.xy),
        "n_genes": len(data.keys),
        "static": static.draw(result, data, examples),
        "static_unseen": static.draw(result, data, unseen),
        "examples": (len(examples), len(unseen)),
        "histogram": charts.gene_histogram(data.pcc[data.panel], data.null_pcc, title),
        "ranked": _ranked(data),
        "intervals": intervals(data),
        "calibration": calibration,
        "calibration_chart": charts.calibration_chart(calibration, data.section_id),
        "slopes": np.nanpercentile(slopes, [25, 50, 75]).tolist() if np.isfinite(slopes).any() else None,
        "clusters": found,
    }


def _ranked(data: SectionData) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (title, rows of ``genes.csv`` with their index) for the best, median and worst genes by PCC, or all if few."""
    rows: list[dict[str, Any]] = data.gene_table.assign(index=np.arange(len(data.keys))).to_dict("records")  # type: ignore[assignment]
    return [(title, [rows[i] for i in found]) for title, found in ranked_genes(data.pcc)]


def _examples(data: SectionData) -> list[int]:
    """Return the indices of the genes to draw, see ``SHOWN_GENES``; all of the most variable genes if they are six or fewer."""
    ranked = sorted(data.hvg.tolist(), key=lambda i: -np.nan_to_num(data.pcc[i]))
    if len(ranked) <= 6:
        return ranked
    return [*ranked[:4], ranked[len(ranked) // 2], ranked[-1]]


def _unseen_examples(data: SectionData) -> list[int]:
    """Return the indices of the unseen genes to draw, see ``SHOWN_UNSEEN``; all of them if they are three or fewer."""
    ranked = sorted(data.unseen[:50].tolist(), key=lambda i: -np.nan_to_num(data.pcc[i]))
    return ranked if len(ranked) <= 3 else [*ranked[:2], ranked[len(ranked) // 2]]
