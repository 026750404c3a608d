"""Write the demo's scores over several seeds to docs/results.md, and a figure to docs/demo.jpg.

make demo  # builds the shards and trains seed 0
for s in 1 2; do
  comtip pretrain --config configs/demo_cpu.yaml --out runs/seed$s --set train.seed=$s
  comtip evaluate runs/seed$s --shards runs/demo/shards --out runs/seed$s
done
python bench/demo_seeds.py runs/demo runs/seed1 runs/seed2
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "zero_shot": "**CoMTIP, zero-shot**",
    "zero_shot_levels": "CoMTIP, from level sentences alone",
    "zero_shot_unseen_genes": "CoMTIP, genes not in training",
    "unseen_mean_map": "the same genes: mean map of the trained genes",
    "unseen_names_shuffled": "the same genes: each with the name of another",
    "unseen_vectors_shuffled": "the same genes: each with the gene vector of another",
    "unseen_ridge": "the same genes: ridge trained on them (supervised)",
    "control_null": "spatial null: predicted map rotated and shifted",
    "ridge_colour": "ridge on mean colour (supervised)",
    "ridge_features": "ridge on encoder features (supervised)",
    "ridge_frozen": "ridge on frozen stem features (supervised)",
}
COLUMNS = ("mean_pcc_50_hvg", "mean_pcc_all", "partial_pcc_50_hvg")
HEADS = ("50 most variable", "all panel genes", "50, partial (colour, depth)")
DOCS = Path(__file__).resolve().parent.parent / "docs"


def cell(values: list[float | None]) -> str:
    """Return the mean of the values that are not None, with their range if there are several, as text."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.3f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.3f} to {max(known):.3f})"


Bounds = dict[str, tuple[float, float]]
"""Lower and upper bound of the interval of each method."""


def table(runs: list[dict[str, Any]], cohort: str, norm: str, bounds: Sequence[Bounds] = ()) -> list[str]:
    """Return the lines of the Markdown table for one cohort and one normalisation (``cp10k`` or ``raw``).

    ``bounds``, one per run, are those of the mean PCC over the 50 most variable genes; without them there is no such column.
    """
    heads = [*HEADS, *(["95 % interval of the first"] if bounds else []), "undefined"]
    lines = ["| method | " + " | ".join(heads) + " |", "|" + "---|" * (1 + len(heads))]
    for key, name in NAMES.items():
        scores = [r["cohorts"][cohort].get(key, {}).get(norm) for r in runs]
        scores = [s for s in scores if s is not None]
        if not scores:
            continue
        cells = [cell([s[c] for s in scores]) for c in COLUMNS]
        if bounds:
            known = [b[key] for b in bounds if key in b]
            cells.append(" to ".join(f"{statistics.mean(x):.3f}" for x in zip(*known, strict=True)) if known else "-")
        cells.append(", ".join(str(s["undefined_genes"]) for s in scores))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def bounds_of(folders: list[Path], sections: list[str]) -> list[Bounds]:
    """Return the bounds of each run for the one test section of a cohort; none if there are several."""
    if len(sections) != 1:
        return []
    tables = [[r for r in _rows(folder / "intervals.csv") if r["section"] == sections[0]] for folder in folders]
    return [{r["predictor"]: (float(r["low"]), float(r["high"])) for r in rows} for rows in tables]


def differences(folders: list[Path]) -> list[str]:
    """Return the lines of the table of paired differences between the zero-shot prediction and each baseline."""
    tables = [{(r["section"], r["predictor"]): r for r in _rows(folder / "intervals.csv")} for folder in folders]
    lines = [
        "",
        "## Difference to the baselines",
        "PCC of the zero-shot prediction minus PCC of the baseline over the 50 most variable genes, log1p CP10K, per seed, with its",
        "95 % bootstrap interval over spatial blocks of the section (paired). For references of genes not in training, the difference",
        "is that of the model on these genes.",
        "",
        "| section | baseline | " + " | ".join(f"seed {_seed(f)}" for f in folders) + " |",
        "|---|---|" + "---|" * len(folders),
    ]
    for section, predictor in tables[0]:
        if predictor in NAMES and predictor not in ("zero_shot", "zero_shot_unseen_genes"):
            cells = [t[section, predictor] for t in tables]
            texts = [
                f"{float(c['difference']):+.3f} ({float(c['difference_low']):+.3f} to {float(c['difference_high']):+.3f})"
                for c in cells
            ]
            lines.append(f"| {section} | {NAMES[predictor]} | " + " | ".join(texts) + " |")
    return lines


def _title(seeds: list[int]) -> str:
    """Return what the cells of the tables are."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}: PCC"
    return f"seeds {', '.join(map(str, seeds))}: mean PCC (range over seeds)"


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_results(folders: list[Path]) -> None:
    """Write docs/results.md from the run folders, one per seed; the page is kept from its section "The report" on."""
    runs = [json.loads((f / "metrics.json").read_text(encoding="utf-8")) for f in folders]
    seeds = [json.loads(json.dumps(_seed(f))) for f in folders]
    lines = [
        "# Results of the demo",
        "",
        f"`configs/demo_cpu.yaml` on the sample sections, {_title(seeds)}.",
        "The page is written by `bench/demo_seeds.py`; its docstring lists the commands.",
        "",
        "- Test sections: breast her2st_A1 (patient_A, trained on patient_C); olfactory bulb mob_Rep9 (mouse_D, trained on",
        "  mouse_A and the unstated donor of mob_st2k).",
        "- The 50 most variable genes are chosen on the training sections. Those that are not in training, if any, count as well:",
        "  zero-shot predicts them as unseen genes, and ridge regression is trained on them.",
        "- Ridge regression is fitted on the same training spots; its penalty is chosen by leave-one-section-out, and so are its frozen",
        "  features: the last stages of the stem with stride 16 and 32, or all its stages ([ablations](ablations.md) has both, section 5).",
        "- Intervals are those of a bootstrap over spatial blocks of the section; bounds are means over seeds.",
        "- A gene with an undefined PCC counts as 0; the last column counts such genes per seed.",
        "- Genes not in training: the model knows what distinguishes them only as far as it scores above the mean map and above the",
        "  control in which they exchange names; ridge regression that is trained on them shows how much these images allow",
        "  ([evaluation](evaluation.md#unseen-genes)).",
    ]
    for cohort in runs[0]["cohorts"]:
        for norm, title in (("cp10k", "log1p CP10K"), ("raw", "log1p raw counts")):
            # Intervals are computed on CP10K alone.
            bounds = bounds_of(folders, runs[0]["cohorts"][cohort]["sections"]) if norm == "cp10k" else []
            lines += ["", f"## {cohort.replace('_', ' ')}, {title}", *table(runs, cohort, norm, bounds)]
    lines += differences(folders)
    lines += ["", "## Training", "| seed | stopped | best step | validation |", "|---|---|---|---|"]
    for folder, seed in zip(folders, seeds, strict=True):
        rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        valid = [r for r in rows if r["kind"] == "valid"]
        best = max(valid, key=lambda r: r["score"])
        lines.append(f"| {seed} | step {valid[-1]['step']} | {best['step']} | {best['score']:.3f} |")
    page = DOCS / "results.md"
    _, heading, rest = page.read_text(encoding="utf-8").partition("\n## The report")  # written by hand from here on
    page.write_text("\n".join(lines) + "\n" + heading + rest, encoding="utf-8")
    print("\n".join(lines))


def _seed(folder: Path) -> int:
    import yaml

    return int(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["train"]["seed"])


def write_picture(folder: Path) -> None:
    """Write docs/demo.jpg with the two best predicted genes of the olfactory bulb test section."""
    from comtip_shards import open_sets

    from comtip_fast.evaluation.figures import maps
    from comtip_fast.inference import GeneQuery, Predictor
    from comtip_fast.metrics import pcc_per_gene

    predictor = Predictor.load(folder)
    shards = open_sets(predictor.config.data.shards)
    number = shards.section_number("mob_Rep9")
    spots = shards.select(sections=[number])
    xy = shards.spots.loc[spots, ["x_px", "y_px"]].to_numpy(float)
    features = predictor.image_features(shards.tiles(spots).transpose(0, 3, 1, 2), shards.stain(number), xy)
    entry = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["sections"]["mob_Rep9"]
    gene_of = {g.key: g for g in shards.genes}
    row_of = {g.key: i for i, g in enumerate(shards.genes)}
    keys = entry["genes_50_hvg"]
    queries = [GeneQuery(gene_of[k].symbol, gene_of[k].name, k) for k in keys]
    predicted = predictor.predict(features, queries, cohort=shards.cohort_of_section(number))["cp10k"]
    counts = shards.counts(spots).toarray()
    measured = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)[:, [row_of[k] for k in keys]]
    pcc = pcc_per_gene(measured, predicted)
    best = np.argsort(-np.nan_to_num(pcc))[:2]
    genes = [(gene_of[keys[i]].symbol, measured[:, i], predicted[:, i], float(pcc[i])) for i in best]
    meta = shards.manifest.sections[number]
    overview, mpp = shards.overview(number)
    uri = maps(overview, mpp, meta.mpp, xy, meta.spot_diameter_um, genes)
    (DOCS / "demo.jpg").write_bytes(base64.b64decode(uri.split(",", 1)[1]))


def main() -> None:
    """Write the results page and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="run folders, one per seed; the figure is drawn from the first"
    )
    folders = parser.parse_args().runs
    write_results(folders)
    write_picture(folders[0])


if __name__ == "__main__":
    main()
