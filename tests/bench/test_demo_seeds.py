"""The results page lists every predictor of an evaluation that has scores."""

from bench.demo_seeds import NAMES, table
from comtip_fast.evaluation.scoring import PREDICTORS


def run(**scores: float | None) -> dict[str, object]:
    """Return metrics with one cohort, in which each predictor has one score, or None."""
    columns = ("mean_pcc_50_hvg", "mean_pcc_all", "partial_pcc_50_hvg")
    entry = {
        name: {"cp10k": None if s is None else dict.fromkeys(columns, s) | {"undefined_genes": 2}}
        for name, s in scores.items()
    }
    return {"cohorts": {"human_breast": entry}}


def test_every_predictor_has_a_name():
    assert tuple(NAMES) == PREDICTORS


def test_a_predictor_without_scores_has_no_row():
    old = {"zero_shot": 0.2, "unseen_vectors_shuffled": None}
    lines = table([run(**old), run(**old, unseen_mean_map=0.1)], "human_breast", "cp10k")
    assert len(lines) == 4
    assert (
        lines[2]
        == "| **CoMTIP, zero-shot** | 0.200 (0.200 to 0.200) | 0.200 (0.200 to 0.200) | 0.200 (0.200 to 0.200) | 2, 2 |"
    )
    assert lines[3].startswith("| the same genes: mean map of the trained genes | 0.100 | ")


def test_bounds_are_means_over_runs():
    bounds = [{"zero_shot": (0.1, 0.3)}, {"zero_shot": (0.2, 0.4)}]
    head, _, row = table([run(zero_shot=0.2), run(zero_shot=0.3)], "human_breast", "cp10k", bounds)
    assert "| 95 % interval of the first |" in head
    assert row.endswith("| 0.150 to 0.350 | 2, 2 |")
