"""The table of scores that ``comtip evaluate`` prints."""

from __future__ import annotations

from typing import Any

from comtip_fast.evaluation.evaluate import predictors_of


def summary_table(metrics: dict[str, Any]) -> str:
    """Return the mean PCCs of log1p CP10K as a text table, with one line per cohort and predictor that has scores."""
    first = "50 HVG" if metrics.get("gene_list") is None else "first 50"
    lines = [f"{'cohort':<28}{'predictor':<24}{first:>8}{'all':>8}{'partial':>9}   (mean PCC, log1p CP10K)"]
    for cohort, entry in metrics["cohorts"].items():
        for name in predictors_of(entry):
            s = entry[name]["cp10k"]
            if s is not None:
                cells = [s["mean_pcc_50_hvg"], s["mean_pcc_all"], s["partial_pcc_50_hvg"]]
                text = [f"{c:.3f}" if c is not None else "-" for c in cells]
                lines.append(f"{cohort:<28}{name:<24}{text[0]:>8}{text[1]:>8}{text[2]:>9}{_note(s)}")
    if metrics.get("gene_list") is not None:
        lines += [
            f"{name}: measured {s['n_genes_all']} of the listed genes; no run trained {s['n_genes_unseen']} of these, but ridge regression does"
            for name, s in metrics["sections"].items()
        ]
    return "\n".join(lines)


def _note(scores: dict[str, Any]) -> str:
    """Return what a line of the table says about a method that knows only some genes; empty text otherwise."""
    if scores.get("fitted_genes", 0) == scores.get("genes", 0):
        return ""
    of_model = scores["model_on_fitted"]
    cells = ["-" if of_model[k] is None else f"{of_model[k]:.3f}" for k in ("mean_pcc_50_hvg", "mean_pcc_all")]
    return f"   {scores['fitted_genes']} of {scores['genes']} genes, on which zero_shot has {cells[0]} and {cells[1]}"
