"""Write ``report.html``, one self-contained page for readers without a machine-learning background."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from comtip_shards.storage.atomic import write_atomic
from jinja2 import Environment, PackageLoader, select_autoescape

from comtip_fast._version import __version__
from comtip_fast.evaluation import figures
from comtip_fast.evaluation.evaluate import PREDICTORS, Evaluation, SectionData

LABELS = {
    "zero_shot": "CoMTIP, zero-shot",
    "zero_shot_levels": "CoMTIP, from level sentences alone (no linear readout)",
    "zero_shot_unseen_genes": "CoMTIP, unseen genes",
    "control_null": "Null: rotated and shifted predictions",
    "ridge_colour": "Ridge on mean tile colour (supervised)",
    "ridge_features": "Ridge on the image encoder's features (supervised)",
    "ridge_frozen": "Ridge on the frozen stem's features, mean and standard deviation (supervised)",
}
SHOWN_GENES = "the four best, the median and the worst predicted of the 50 most variable genes"
SHOWN_UNSEEN = "the two best and the median predicted of the (up to 50) most variable held-out genes"


def write_report(run_dir: Path | None, result: Evaluation, out: Path) -> None:
    """Write the report.

    Parameters
    ----------
    run_dir
        Run folder with ``metrics.jsonl``, for the loss curves; None for an export.
    result
        From :func:`comtip_fast.evaluation.evaluate.evaluate`.
    out
        The file to write.
    """
    env = Environment(
        loader=PackageLoader("comtip_fast.evaluation", "templates"),
        autoescape=select_autoescape(["html", "j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["num"] = lambda v: "–" if v is None else f"{v + 0.0:.3f}".replace("-0.000", "0.000")
    page = env.get_template("report.html.j2").render(
        name=result.predictor.config.name,
        version=__version__,
        date=datetime.datetime.now().astimezone().date().isoformat(),
        metrics=result.metrics,
        labels=LABELS,
        predictors=PREDICTORS,
        cohorts=_cohorts(result),
        curves=figures.loss_curves(run_dir / "metrics.jsonl") if run_dir is not None else None,
        training=_training(result),
        shown_genes=SHOWN_GENES,
        shown_unseen=SHOWN_UNSEEN,
    )
    write_atomic(out, page)


def _training(result: Evaluation) -> dict[str, Any]:
    """Return what the page states about training: sections, donors, genes and credits."""
    predictor = result.predictor
    lineage = predictor.lineage
    sections = [asdict(section) for section in lineage.merged_sections()]
    donors = {s["donor"] for s in sections if s["split"] == "train"}
    scored = {d.section_id for d in result.sections}
    rows = [s | {"scored": s["section_id"] in scored} for s in sections]
    order = {"train": 0, "val": 1, "test": 2, "": 3}
    not_in_training_set = [
        {k: getattr(s, k) for k in ("section_id", "species", "tissue", "donor", "n_spots", "licence", "attribution")}
        | {"split": "not in the training set", "scored": True}
        for s in result.shards.manifest.sections
        if s.section_id in scored and s.section_id not in {r["section_id"] for r in rows}
    ]
    return {
        "rows": sorted(rows, key=lambda s: (s["species"], order[s["split"]], s["section_id"])) + not_in_training_set,
        "shared_val": [s["section_id"] for s in sections if s["split"] == "val" and s["donor"] in donors],
        "runs": lineage.labels(),
        "parents_known": lineage.parents_known,
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


def _cohorts(result: Evaluation) -> list[dict[str, Any]]:
    out = []
    for cohort, entry in result.metrics["cohorts"].items():
        sections = [_section(result, d) for d in result.sections if d.cohort == cohort]
        out.append(
            {
                "title": cohort.replace("_", " "),
                "entry": entry,
                "sections": sections,
                "ridge_colour": _input_of(sections[0]["metrics"]["ridge_colour"]),
                "bars": figures.score_bars(entry, "cp10k"),
            }
        )
    return out


def _input_of(scores: dict[str, Any]) -> str | None:
    """Return the input that the baseline chose; None if no baseline was fitted."""
    return scores["cp10k"]["input"] if scores.get("cp10k") else None


def _section(result: Evaluation, data: SectionData) -> dict[str, Any]:
    number = result.shards.section_number(data.section_id)
    meta = result.shards.manifest.sections[number]
    overview, mpp = result.shards.overview(number)
    symbol = {g.key: g.symbol for g in result.shards.genes}

    def draw(indices: list[int]) -> str | None:
        if not indices:
            return None
        genes = [
            (symbol[data.keys[i]], data.measured["cp10k"][:, i], data.predicted["cp10k"][:, i], float(data.pcc[i]))
            for i in indices
        ]
        return figures.maps(overview, mpp, meta.mpp, data.xy, meta.spot_diameter_um, genes)

    chosen = _examples(data)
    chosen_unseen = _unseen_examples(data)
    return {
        "id": data.section_id,
        "meta": meta,
        "metrics": result.metrics["sections"][data.section_id],
        "maps": draw(chosen),
        "genes": [symbol[data.keys[i]] for i in chosen],
        "unseen_maps": draw(chosen_unseen),
        "unseen_genes": [symbol[data.keys[i]] for i in chosen_unseen],
        "histogram": figures.gene_histogram(
            data.pcc[data.panel], data.null_pcc, f"{data.section_id}: {data.panel.size} panel genes"
        ),
    }


def _examples(data: SectionData) -> list[int]:
    """Return the genes to draw, see ``SHOWN_GENES``."""
    ranked = sorted(data.hvg.tolist(), key=lambda i: -np.nan_to_num(data.pcc[i]))
    if len(ranked) <= 6:
        return ranked
    return [*ranked[:4], ranked[len(ranked) // 2], ranked[-1]]


def _unseen_examples(data: SectionData) -> list[int]:
    """Return the unseen genes to draw, see ``SHOWN_UNSEEN``."""
    ranked = sorted(data.unseen[:50].tolist(), key=lambda i: -np.nan_to_num(data.pcc[i]))
    return ranked if len(ranked) <= 3 else [*ranked[:2], ranked[len(ranked) // 2]]
