"""Run HEST-Benchmark for several encoders: features once per section, then every fold and variant."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from comtip_shards.sections.benchmark import BenchmarkSection, benchmark_of, load_benchmark
from comtip_shards.sections.splits import donor_name
from comtip_shards.storage.atomic import write_atomic

from comtip_fast.benchmarks.hest.folder import (
    NOT_AVERAGED,
    BenchmarkSample,
    BenchmarkTask,
    H5Patches,
    read_benchmark,
    read_expression,
)
from comtip_fast.benchmarks.hest.recipe import COMPONENTS, FoldData, FoldScore, score_fold
from comtip_fast.benchmarks.hest.variants import VARIANTS, Variant
from comtip_fast.evaluation.encoders import RunEncoder, TileEncoder, open_encoder
from comtip_fast.evaluation.feature_files import FeatureFiles
from comtip_fast.lineage import LEARNING, Lineage
from comtip_fast.metrics import finite_or_none
from comtip_fast.runtime.csv_text import csv_text
from comtip_fast.runtime.devices import pick_device

log = logging.getLogger("comtip_fast")
FORMAT, VERSION = "comtip-hest-benchmark", 1


@dataclass
class HestScores:
    """Scores of all encoders, tasks, folds and variants."""

    folds: pd.DataFrame
    """One row per ``encoder``, ``task``, ``fold`` and ``variant``: ``pcc`` (mean over genes), ``n_undefined`` (correlations),
    ``alpha`` and ``n_components``."""
    genes: pd.DataFrame
    """One row per ``encoder``, ``task``, ``fold``, ``variant`` and ``gene``: ``pcc``, NaN where undefined."""
    encoders: dict[str, dict[str, Any]]
    """Facts about each encoder, and the benchmark's sections that it was trained on."""

    def summary(self) -> pd.DataFrame:
        """Return the mean scores over folds.

        Returns
        -------
        DataFrame
            One row per encoder, variant and task: ``encoder``, ``variant``, ``task``, ``pcc`` (mean over folds), ``std_over_folds``
            and ``n_undefined`` (correlations, over all folds). The last row of an encoder and variant has the task ``average`` and
            no standard deviation (NaN); it is missing if no task is averaged. Its ``pcc`` leaves out the tasks in
            :data:`comtip_fast.benchmarks.hest.folder.NOT_AVERAGED`, as published; its ``n_undefined`` counts all tasks.
        """
        rows = []
        for (encoder, variant), own in self.folds.groupby(["encoder", "variant"], sort=False):
            means = {}
            for task, part in own.groupby("task", sort=False):
                values, means[task] = part["pcc"].to_numpy(), float(np.mean(part["pcc"].to_numpy()))
                rows.append(
                    _row(encoder, variant, task, means[task], float(np.std(values)), int(part["n_undefined"].sum()))
                )
            averaged = [m for task, m in means.items() if task not in NOT_AVERAGED]
            if averaged:
                mean = float(np.mean(averaged))
                rows.append(_row(encoder, variant, "average", mean, math.nan, int(own["n_undefined"].sum())))
        return pd.DataFrame(rows)

    def table(self) -> str:
        """Return the summary as text: a row per encoder and variant, a column per task."""
        wide = self.summary().pivot_table(
            index=["encoder", "variant"], columns="task", values="pcc", sort=False, dropna=False, observed=True
        )
        names = [c for c in wide.columns if c != "average"] + ["average"] * ("average" in wide.columns)
        width = max(12, *(len(str(e)) for e in self.encoders)) + 2
        lines = [f"{'encoder':<{width}}{'variant':<14}" + "".join(f"{n:>10}" for n in names) + "   (mean PCC)"]
        for (encoder, variant), row in zip(wide.index.tolist(), wide[names].to_numpy(), strict=True):
            cells = "".join(f"{'-' if math.isnan(v) else f'{v:.4f}':>10}" for v in row)
            lines.append(f"{encoder:<{width}}{variant:<14}{cells}")
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write ``hest.json`` (encoders and summary), ``hest_folds.csv`` and ``hest_genes.csv`` to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "variants": {name: v.meaning for name, v in VARIANTS.items()},
            "encoders": self.encoders,
            "summary": self.summary().to_dict("records"),
        }
        write_atomic(folder / "hest.json", json.dumps(finite_or_none(content), indent=1, allow_nan=False) + "\n")
        for name, frame in (("hest_folds.csv", self.folds), ("hest_genes.csv", self.genes)):
            write_atomic(folder / name, csv_text(frame))


def _row(encoder: Any, variant: Any, task: Any, pcc: float, std: float, undefined: int) -> dict[str, Any]:
    """Return one row of the summary table."""
    return {
        "encoder": encoder,
        "variant": variant,
        "task": task,
        "pcc": pcc,
        "std_over_folds": std,
        "n_undefined": undefined,
    }


def benchmark_hest(
    folder: Path | str,
    encoders: Sequence[str],
    *,
    tasks: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    whole_patch: bool = False,
    precision: str = "auto",
    device: str = "auto",
) -> HestScores:
    """Score encoders on a folder in the layout of HEST-Benchmark.

    Parameters
    ----------
    folder
        The folder, with one subfolder per task.
    encoders
        Specifications, see :data:`comtip_fast.constants.ENCODER_HELP`.
    tasks
        Names of subfolders; default: all.
    variants
        Names in :data:`comtip_fast.benchmarks.hest.variants.VARIANTS`; default: all.
    whole_patch
        Whether a run whose tiles are not 112 um wide gets the complete patch, resized to the run's tile size in px.
    precision
        ``auto`` (bf16 on a GPU), ``bf16`` or ``fp32``, for timm models and ``lite0``; a run uses its own.
    device
        ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    FileNotFoundError, ValueError
        The folder, a file, an encoder or a name cannot be used.
    """
    unknown = [v for v in variants or [] if v not in VARIANTS]
    if unknown:
        raise ValueError(f"`variants` {', '.join(unknown)}: no such variant; choose from {', '.join(VARIANTS)}")
    if not encoders:
        raise ValueError("`encoders`: the list is empty; name at least one encoder")
    chosen = [VARIANTS[v] for v in (variants or VARIANTS)]
    found = read_benchmark(Path(folder), tasks)
    fold_rows: list[dict[str, Any]] = []
    gene_rows: list[pd.DataFrame] = []
    facts: dict[str, dict[str, Any]] = {}
    opened = [open_encoder(s, pick_device(device), precision) for s in encoders]  # before the slow work
    for encoder in opened:
        label = _unique(
            f"embeddings:{encoder.path.name}" if isinstance(encoder, FeatureFiles) else encoder.label, facts
        )
        facts[label] = encoder_facts(encoder, found, whole_patch)
        for task in found:
            log.info("scoring %s on task %s (%d folds)", label, task.name, len(task.folds))
            for fold, variant, score in score_task(task, encoder, chosen, whole_patch):
                names = {"encoder": label, "task": task.name, "fold": fold, "variant": variant.name}
                fold_rows.append(names | _fold_facts(score))
                gene_rows.append(pd.DataFrame({**names, "gene": task.genes, "pcc": score.pcc_G}))
    return HestScores(pd.DataFrame(fold_rows), pd.concat(gene_rows, ignore_index=True), facts)


def _unique(label: str, used: dict[str, Any]) -> str:
    """Return the label, with a number if it is used already."""
    names = (label if n == 1 else f"{label} ({n})" for n in itertools.count(1))
    return next(name for name in names if name not in used)


def _fold_facts(score: FoldScore) -> dict[str, Any]:
    """Return the columns of a fold's score in ``hest_folds.csv``."""
    return {
        "pcc": score.mean,
        "n_undefined": score.n_undefined,
        "alpha": score.alpha,
        "n_components": score.n_components,
    }


def score_task(
    task: BenchmarkTask, encoder: TileEncoder | FeatureFiles, variants: Sequence[Variant], whole_patch: bool = False
) -> Iterable[tuple[int, Variant, FoldScore]]:
    """Yield the score of every fold and variant; each section is encoded once."""
    data = {id_: read_sample(s, encoder, task.genes, whole_patch) for id_, s in task.samples().items()}
    for fold in task.folds:
        train, test = (_joined([data[s.id] for s in half]) for half in (fold.train, fold.test))
        if min(train.features_NF.shape) < COMPONENTS and any(v.pca for v in variants):
            log.warning(
                "%s, fold %d: %d training spots with %d features, so fewer than the recipe's %d components are used",
                task.name,
                fold.number,
                *train.features_NF.shape,
                COMPONENTS,
            )
        for variant in variants:
            yield fold.number, variant, score_fold(train, test, variant)


def read_sample(
    sample: BenchmarkSample, encoder: TileEncoder | FeatureFiles, genes: Sequence[str], whole_patch: bool = False
) -> FoldData:
    """Return features and targets of the spots of one section that have a patch or embedding; ``section_N`` is 0."""
    if isinstance(encoder, FeatureFiles):
        found = encoder.of(sample.id, sample.task)
        barcodes, features = found.names, found.values_NF
    else:
        patches = H5Patches(sample.patches, encoder.geometry, whole=whole_patch)
        barcodes, features = patches.barcodes, encoder.encode(patches)
    expression = read_expression(sample, barcodes, genes)
    scale_N1 = 1e4 / np.maximum(expression.total_N, 1.0)[:, None]
    return FoldData(
        features,
        np.log1p(expression.counts_NG),
        np.log1p(expression.counts_NG * scale_N1),
        np.zeros(len(features), np.int64),
    )


def _joined(parts: Sequence[FoldData]) -> FoldData:
    """Concatenate sections; ``section_N`` becomes the index of the section."""
    section = np.concatenate([np.full(len(p.features_NF), i, np.int64) for i, p in enumerate(parts)])
    features, raw, cp10k = (
        np.concatenate([getattr(p, k) for p in parts]) for k in ("features_NF", "raw_NG", "cp10k_NG")
    )
    return FoldData(features, raw, cp10k, section)


def encoder_facts(
    encoder: TileEncoder | FeatureFiles, tasks: Sequence[BenchmarkTask], whole_patch: bool
) -> dict[str, Any]:
    """Return the record of an encoder in the results; log a warning if it was trained on the benchmark."""
    if isinstance(encoder, FeatureFiles):
        return {"kind": "embeddings", "trained_on": None}
    if not isinstance(encoder, RunEncoder):
        return encoder.facts | {"trained_on": None}
    lineage = encoder.predictor.lineage
    seen = seen_in_training(lineage, tasks)
    if not seen and not lineage.parents_known:
        log.warning(
            "%s was exported without lineage, so it is unknown whether it was trained on sections or donors of the benchmark",
            encoder.label,
        )
        return encoder.facts | {"whole_patch": whole_patch, "trained_on": None}
    if seen:
        log.warning(
            "training or early stopping of %s used sections or donors of the benchmark: %s; its scores are not on unseen data",
            encoder.label,
            ", ".join(seen),
        )
    return encoder.facts | {"whole_patch": whole_patch, "trained_on": seen}


def seen_in_training(lineage: Lineage, tasks: Sequence[BenchmarkTask]) -> list[str]:
    """Return the ids of the benchmark sections that a run of the lineage used for training or early stopping, or whose donor it used."""
    ids = {i.lower(): BenchmarkSection(t.name, i, "scored", "", "the folder") for t in tasks for i in t.samples()}
    of_donor: dict[str, set[str]] = {}  # a donor may have several sections in the benchmark
    for key, listed in load_benchmark().items():
        if donor_name(listed.donor) and key in ids:
            of_donor.setdefault(donor_name(listed.donor), set()).add(ids[key].id)
    found: set[str] = set()
    for run in lineage.runs:
        for section in run.sections:
            if section.split in LEARNING:
                hit = benchmark_of(section, ids)
                found |= {hit.id} if hit else set()
                found |= of_donor.get(donor_name(section.donor), set())
    return sorted(found)
