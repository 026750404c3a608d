"""Tables of the report as CSV files in its folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from comtip_shards.storage.atomic import write_atomic

from comtip_fast.evaluation.evaluate import Evaluation, predictors_of
from comtip_fast.evaluation.scoring import NORMALISATIONS
from comtip_fast.runtime.csv_text import csv_text

SCORES, INTERVALS, CALIBRATION, CLUSTERS = "scores.csv", "intervals.csv", "calibration.csv", "clusters.csv"


def score_table(result: Evaluation) -> pd.DataFrame:
    """Return one row per ``cohort``, ``predictor`` and ``normalisation`` that has scores, with the fields of :class:`Score`.

    Scores are means over the cohort's sections; ``undefined_genes``, ``genes`` and ``fitted_genes`` are sums over the sections.
    ``model_mean_pcc_50_hvg`` and ``model_mean_pcc_all`` are the model's scores on the genes that a method was fitted to. The last four
    are empty for a predictor that predicts every gene.
    """
    rows = [
        {"cohort": cohort, "predictor": name, "normalisation": norm, **entry[name][norm]}
        | {f"model_{k}": v for k, v in entry[name][norm].get("model_on_fitted", {}).items()}
        for cohort, entry in result.metrics["cohorts"].items()
        for name in predictors_of(entry)
        for norm in NORMALISATIONS
        if entry[name].get(norm) is not None
    ]
    columns = ["cohort", "predictor", "normalisation", "mean_pcc_50_hvg", "mean_pcc_all", "partial_pcc_50_hvg"]
    fitted = ["genes", "fitted_genes", "model_mean_pcc_50_hvg", "model_mean_pcc_all"]
    return pd.DataFrame(rows).reindex(columns=[*columns, "undefined_genes", *fitted])


def write_tables(tables: dict[str, pd.DataFrame], folder: Path) -> list[str]:
    """Write the tables that have rows, with six significant digits, and return their names."""
    written = []
    for name, table in tables.items():
        if len(table):
            write_atomic(folder / name, csv_text(table))
            written.append(name)
    return written
