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

    Scores are means over the cohort's sections; ``undefined_genes`` is a sum over the sections.
    """
    rows = [
        {"cohort": cohort, "predictor": name, "normalisation": norm, **entry[name][norm]}
        for cohort, entry in result.metrics["cohorts"].items()
        for name in predictors_of(entry)
        for norm in NORMALISATIONS
        if entry[name].get(norm) is not None
    ]
    columns = ["cohort", "predictor", "normalisation", "mean_pcc_50_hvg", "mean_pcc_all", "partial_pcc_50_hvg"]
    return pd.DataFrame(rows)[[*columns, "undefined_genes"]]


def write_tables(tables: dict[str, pd.DataFrame], folder: Path) -> list[str]:
    """Write the tables that have rows, with six significant digits, and return their names."""
    written = []
    for name, table in tables.items():
        if len(table):
            write_atomic(folder / name, csv_text(table))
            written.append(name)
    return written
