"""Downstream tasks on a trained run: signals are found, controls are at chance, files and errors."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from comtip_shards import ShardSet

from comtip_fast.cli import main
from comtip_fast.evaluation.evaluate import evaluate
from comtip_fast.evaluation.tasks import TASKS
from comtip_fast.evaluation.tasks.context import TaskContext, TaskOptions
from comtip_fast.evaluation.tasks.expression import mean_rows
from comtip_fast.evaluation.tasks.gene_sets import read_gmt
from comtip_fast.evaluation.tasks.labels import LabelFile
from comtip_fast.evaluation.tasks.rows import TaskRow
from comtip_fast.evaluation.tasks.run import evaluate_tasks, run_tasks
from comtip_fast.evaluation.tasks.text import SpotSentences
from comtip_fast.inference import Predictor
from comtip_fast.training.validation import space_numbers
from testkit.shards import without_genes
from testkit.tiny import SYMBOLS

SECTIONS = ["x1", "v1"]


@pytest.fixture(scope="module")
def files(tiny_shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with labels (high or low field), embeddings (the field, with noise) and gene sets of even and odd genes."""
    folder = tmp_path_factory.mktemp("task_files")
    (folder / "sets.gmt").write_text(
        "rise\t\t" + "\t".join(SYMBOLS[::2]) + "\nfall\t\t" + "\t".join(SYMBOLS[1::2]) + "\nfew\t\tERBB2\tKRT14\n"
    )
    labels, features = [], []
    rng = np.random.default_rng(0)
    rows = {g.symbol: i for i, g in enumerate(tiny_shards.genes)}
    rise, fall = ([rows[s] for s in SYMBOLS[start::2]] for start in (0, 1))
    for number, section in enumerate(tiny_shards.manifest.sections):
        spots = tiny_shards.select(sections=[number])
        counts = np.log1p(tiny_shards.counts(spots).toarray())
        field = counts[:, rise].mean(1) - counts[:, fall].mean(1)
        names = tiny_shards.spots.loc[spots, "spot_id"].tolist()
        text = np.where(field > 0.4, "high", np.where(field < -0.4, "low", "undetermined"))
        labels.append(pd.DataFrame({"section": section.section_id, "spot": names, "label": text}))
        values = {"f0": field, "f1": rng.normal(size=len(field))}
        features.append(pd.DataFrame({"section": section.section_id, "spot": names, **values}))
    pd.concat(labels).to_csv(folder / "labels.tsv", sep="\t", index=False)
    pd.concat(features).to_csv(folder / "field.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def rows(tiny_run: Path, tiny_shards: ShardSet, files: Path) -> list[TaskRow]:
    return evaluate_tasks(
        tiny_run,
        tiny_shards.path,
        sections=SECTIONS,
        encoders=[f"embeddings:{files / 'field.csv'}"],
        gene_sets=files / "sets.gmt",
        labels=str(files / "labels.tsv"),
        n_bootstrap=40,
        epochs=1,
        device="cpu",
    )


def one(rows: list[TaskRow], task: str, metric: str, method: str, section: str = "x1") -> TaskRow:
    (found,) = [r for r in rows if (r.task, r.metric, r.method, r.section) == (task, metric, method, section)]
    return found


def test_every_task_has_rows_with_intervals_around_the_score(rows: list[TaskRow]):
    assert {r.task for r in rows} == set(TASKS)
    spatial = [r for r in rows if r.section in SECTIONS]
    assert all(np.isfinite([r.value, r.low, r.high]).all() for r in spatial)
    inside = [r.low - 0.02 <= r.value <= r.high + 0.02 for r in spatial if r.task in ("probe", "retrieval", "pathways")]
    assert np.mean(inside) > 0.95
    assert all(r.n > 0 for r in rows)


def test_the_probe_finds_the_signal_and_its_control_does_not(rows: list[TaskRow]):
    colour = one(rows, "probe", "pcc_50", "ridge, colour")
    given = one(rows, "probe", "pcc_50", "ridge, embeddings:field.csv")
    for row in (colour, given):
        assert row.value > 0.3
        assert row.low > 0
        assert row.shuffled < row.value - 0.2
    mean, mse = one(rows, "probe", "pcc_50", "mean of training"), one(rows, "probe", "mse_50", "mean of training")
    assert mean.value == 0.0  # a constant has no correlation
    assert one(rows, "probe", "mse_50", "ridge, embeddings:field.csv").value < mse.value
    zero_shot = one(rows, "probe", "pcc_50", "comtip zero-shot")
    assert zero_shot.value > zero_shot.shuffled + 0.1


def test_unseen_genes_are_scored_next_to_ridge_that_was_trained_on_them(rows: list[TaskRow]):
    zero_shot, ridge = (one(rows, "probe", "pcc_unseen", m) for m in ("comtip zero-shot", "ridge, colour"))
    assert ridge.value > 0.3
    assert zero_shot.value < ridge.value
    assert zero_shot.low <= zero_shot.value <= zero_shot.high
    assert {r.task for r in rows if r.metric == "pcc_unseen"} == {"probe"}


def test_means_over_sections(rows: list[TaskRow]):
    mean = one(rows, "probe", "pcc_50", "ridge, colour", "mean of 2 sections")
    parts = [one(rows, "probe", "pcc_50", "ridge, colour", s).value for s in SECTIONS]
    assert mean.value == pytest.approx(np.mean(parts))
    assert min(parts) - 1e-9 <= mean.low <= mean.high <= max(parts) + 1e-9
    assert mean.n == 2


def test_sections_of_different_cohorts_are_not_averaged():
    values = {"b1": 0.2, "b2": 0.4, "m1": 0.9, "m2": 0.7}
    rows = [TaskRow("probe", s, "m", "pcc_50", v, chance=0.0, shuffled=0.0) for s, v in values.items()]
    cohort = {s: "human_breast" if s.startswith("b") else "mouse_bulb" for s in values}
    sections = [SimpleNamespace(section_id=s, cohort=cohort[s]) for s in values]
    context = SimpleNamespace(sections=sections, options=TaskOptions(n_bootstrap=20))
    found = {r.section: (round(r.value, 6), r.n) for r in mean_rows(rows, context)}  # type: ignore[arg-type]
    assert found == {"mean of 2 sections of human_breast": (0.3, 2), "mean of 2 sections of mouse_bulb": (0.8, 2)}
    alone = SimpleNamespace(sections=sections[:2], options=context.options)
    assert [r.section for r in mean_rows(rows[:2], alone)] == ["mean of 2 sections"]  # type: ignore[arg-type]


def test_retrieval_is_above_chance_and_equals_that_of_training(
    rows: list[TaskRow], tiny_run: Path, tiny_shards: ShardSet
):
    for method, section, n in (("within section", "x1", 49), ("across sections", "all of human_breast", 98)):
        row = one(rows, "retrieval", "image_to_gene_r10", method, section)
        assert row.chance == pytest.approx(10 / n)
        assert row.value > row.chance + 0.1
        assert abs(row.shuffled - row.chance) < 0.2
    predictor = Predictor.load(tiny_run)
    context = TaskContext(predictor, tiny_shards, [3, 2], tiny_shards, TaskOptions())
    section = context.sections[0]
    keys = context.trained_and_measured("human_breast", [3, 2])
    text = SpotSentences(predictor, context.queries(keys), context.values(section, keys)).vectors()
    numbers = space_numbers(torch.from_numpy(section.image.vector_ND), torch.from_numpy(text))
    for name, metric in (("r1", "image_to_gene_r1"), ("t1", "gene_to_image_r1"), ("t5", "gene_to_image_r5")):
        found = one(rows, "retrieval", metric, "within section").value
        assert found == pytest.approx(numbers[name], abs=1 / 49 + 1e-6)  # one pair may be a rounding away from a tie


def test_a_large_section_is_represented_by_neighbouring_spots(quick: Path, tiny_shards: ShardSet, caplog):
    options = TaskOptions(max_spots=20, n_bootstrap=0)
    section = TaskContext(Predictor.load(quick), tiny_shards, [3], tiny_shards, options).sections[0]
    assert len(section.spot_ids) == len(section.xy_N2) == section.cp10k.shape[0] == 20
    assert "section x1 has 49 spots; tasks use 20 neighbouring ones" in caplog.text
    distance = np.linalg.norm(section.xy_N2[:, None] - section.xy_N2[None], axis=-1)
    assert np.median(np.sort(distance, axis=1)[:, 1]) == pytest.approx(40)  # the distance between neighbours


def test_domains_follow_the_field(rows: list[TaskRow]):
    given = one(rows, "domains", "ari", "embeddings:field.csv")
    measured = one(rows, "domains", "ari", "measured expression")
    assert measured.value > 0.5
    assert measured.value > measured.shuffled + 0.3
    assert given.n == measured.n < 49  # undetermined spots are left out
    assert {r.method for r in rows if r.task == "domains"} >= {"comtip encoder", "comtip vector, smoothed", "colour"}


def test_a_section_that_measured_none_of_the_genes_is_left_out_with_a_warning(
    quick: Path, tiny_shards: ShardSet, files: Path, caplog: pytest.LogCaptureFixture
):
    bare = without_genes(tiny_shards, set(SYMBOLS))
    labels, sets = LabelFile(str(files / "labels.tsv")), read_gmt(files / "sets.gmt")
    options = TaskOptions(n_bootstrap=0, n_null=2, labels=labels, gene_sets=sets)
    rows = run_tasks(["probe", "domains", "pathways"], Predictor.load(quick), bare, tiny_shards, options)
    assert {r.task for r in rows} == {"domains"}
    names = ("comtip encoder", "comtip vector", "colour")
    assert {r.method for r in rows} == {*names, *(f"{n}, smoothed" for n in names)}
    for text in (
        "probe: section x1 is left out: it measured none of the most variable genes",
        "domains: section x1 measured none of the most variable genes, so that only image features are scored",
        "pathways: section x1 is left out: it measured fewer than 3 genes of every gene set",
    ):
        assert text in caplog.text


def test_the_probe_is_compared_on_the_unseen_genes_that_training_measured(quick: Path, tiny_shards: ShardSet):
    """A gene without training values is no failure of ridge regression: it is left out, and the model is scored without it, too."""
    predictor, options = Predictor.load(quick), TaskOptions(n_bootstrap=0, n_null=2)
    unseen = [k.partition(":")[2] for k in predictor.held_out_genes]
    train = without_genes(tiny_shards, set(unseen[:2]))
    rows = [
        r for r in run_tasks(["probe"], predictor, tiny_shards, train, options) if r.metric.startswith("pcc_unseen")
    ]
    assert {r.method for r in rows if r.metric == "pcc_unseen"} == {"comtip zero-shot"}
    part = {r.method: r.value for r in rows if r.metric == "pcc_unseen_fitted"}
    assert set(part) == {"comtip zero-shot", "mean of training", "ridge, comtip encoder", "ridge, colour"}
    known = evaluate_genes(predictor, tiny_shards, unseen[2:])
    assert part["comtip zero-shot"] == pytest.approx(known, abs=1e-4)
    assert part["ridge, colour"] > 0.3, "genes without training values do not count as 0"
    none = without_genes(tiny_shards, set(unseen))
    rows = run_tasks(["probe"], predictor, tiny_shards, none, options)
    assert {r.method for r in rows if "unseen" in r.metric} == {"comtip zero-shot"}


def test_a_list_of_genes_replaces_those_that_a_task_chooses(quick: Path, tiny_shards: ShardSet):
    predictor = Predictor.load(quick)
    unseen = [k.partition(":")[2] for k in predictor.held_out_genes][:2]
    listed = [unseen[0], *(k.partition(":")[2] for k in predictor.trained_genes[:3]), unseen[1]]
    options = TaskOptions(n_bootstrap=0, n_null=2, genes=tuple(listed))
    rows = run_tasks(["probe"], predictor, tiny_shards, tiny_shards, options)
    for metric, genes in (("pcc_50", listed), ("pcc_unseen", unseen)):
        found = one(rows, "probe", metric, "comtip zero-shot").value
        assert found == pytest.approx(evaluate_genes(predictor, tiny_shards, genes), abs=1e-4)
    with pytest.raises(ValueError, match="`genes`, section x1: 1 of 1 are not human genes"):
        run_tasks(["probe"], predictor, tiny_shards, tiny_shards, replace(options, genes=("NOGENE",)))


def evaluate_genes(predictor: Predictor, shards: ShardSet, symbols: list[str]) -> float:
    """Return the mean PCC of the zero-shot prediction of some genes in section x1."""
    found = evaluate(predictor, shards, sections=["x1"], genes=symbols, n_null=0)
    return float(found.metrics["sections"]["x1"]["zero_shot"]["cp10k"]["mean_pcc_all"])


def test_sets_that_a_training_section_hardly_measured_are_not_learnt_from_it(
    quick: Path, tiny_shards: ShardSet, files: Path
):
    """Its counts of 0 are no measurement: the regression is that of the other training section alone."""
    predictor, sets = Predictor.load(quick), read_gmt(files / "sets.gmt")
    options = TaskOptions(n_bootstrap=0, n_null=2, gene_sets=sets)
    first = next(n for n, s in enumerate(tiny_shards.manifest.sections) if s.split == "train")
    rise = set(SYMBOLS[::2])
    half = ShardSet(tiny_shards.path)
    missing = np.array([g.symbol in rise for g in half.genes])
    half.measured = lambda n: tiny_shards.measured(n) & ~(missing & (n == first))  # type: ignore[method-assign]
    half_counts = tiny_shards.counts

    def counts(spots: np.ndarray):
        found = half_counts(spots).tolil()
        of_first = half.spots.loc[np.asarray(spots), "section"].to_numpy() == first
        found[np.ix_(of_first, missing)] = 0
        return found.tocsr()

    half.counts = counts  # type: ignore[method-assign]
    alone = ShardSet(tiny_shards.path)
    alone.measured = lambda n: tiny_shards.measured(n) & (n != first)  # type: ignore[method-assign]
    both = run_tasks(["pathways"], predictor, tiny_shards, half, options)
    only = replace(options, gene_sets={"rise": sets["rise"]})  # sets of the same sections share a penalty
    one_section = run_tasks(["pathways"], predictor, tiny_shards, alone, only)
    for method in ("ridge, colour", "ridge, comtip encoder"):
        want = one(one_section, "pathways", "pcc rise", method).value
        assert one(both, "pathways", "pcc rise", method).value == pytest.approx(want)
    assert one(both, "pathways", "pcc fall", "ridge, colour").value > 0.3
    nowhere = run_tasks(["pathways"], predictor, tiny_shards, without_genes(tiny_shards, rise), options)
    assert {r.method for r in nowhere if r.metric in ("mean_pcc", "pcc rise")} == {"comtip zero-shot"}
    part = {r.method: r.value for r in nowhere if r.metric == "mean_pcc_fitted"}
    assert set(part) == {"comtip zero-shot", "ridge, colour", "ridge, comtip encoder", "ridge, comtip vector"}
    assert part["comtip zero-shot"] == pytest.approx(one(nowhere, "pathways", "pcc fall", "comtip zero-shot").value)


def test_pairs_gain_from_the_true_image(rows: list[TaskRow]):
    row = one(rows, "pairs", "auc", "pair head, spots")
    gained = one(rows, "pairs", "auc_gain", "pair head, spots")
    assert gained.value == pytest.approx(row.value - row.shuffled)
    assert gained.value > 0.02
    assert abs(gained.shuffled) < gained.value
    assert gained.chance == 0.0


def test_gene_sets_are_scored_and_small_ones_left_out(rows: list[TaskRow]):
    own = [r for r in rows if r.task == "pathways" and r.section == "x1" and r.method == "comtip zero-shot"]
    assert {r.metric for r in own} == {"mean_pcc", "pcc rise", "pcc fall"}
    assert one(rows, "pathways", "pcc rise", "comtip zero-shot").value > 0.3
    assert one(rows, "pathways", "pcc rise", "ridge, embeddings:field.csv").value > 0.6
    genes = [r for r in rows if r.task == "genes"]
    assert {r.method for r in genes} == {"comtip sentences", "name tokens"}
    assert {r.metric for r in genes} == {"auc_families", "auc_gene_sets"}


def test_the_command_writes_rows_next_to_the_scores(quick: Path, tiny_shards: ShardSet, tmp_path: Path, capsys):
    arguments = ["evaluate", str(quick), "--shards", str(tiny_shards.path), "--out", str(tmp_path), "--device", "cpu"]
    more = ["--null-draws", "3", "--bootstrap", "0", "--tasks", "retrieval", "probe", "--encoder", "timm:test_vit"]
    assert main([*arguments, *more, "--genes", "CD74", "ERBB2"]) == 0
    assert "image_to_gene_r1" in capsys.readouterr().out
    found = json.loads((tmp_path / "tasks.json").read_text())
    assert found["sections"] == ["x1"]
    assert found["gene_list"] == ["CD74", "ERBB2"]
    assert found["readout"] == json.loads((tmp_path / "metrics.json").read_text())["readout"]
    assert found["encoders"]["timm:test_vit (random weights)"]["weights"] == "random, seed 0"
    assert {r["task"] for r in found["rows"]} == {"retrieval", "probe"}
    assert all(r["low"] is None for r in found["rows"])  # no bootstrap
    with (tmp_path / "tasks.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(found["rows"])
    assert {r["method"] for r in table} >= {"ridge, timm:test_vit (random weights)", "ridge, comtip encoder"}


def test_tiles_of_another_width_are_refused(tiny_run: Path, tiny_shards: ShardSet):
    bundle = Predictor.load(tiny_run).bundle
    other = Predictor(replace(bundle, tile_um=bundle.tile_um / 2))
    with pytest.raises(ValueError, match=r"tiles of 224 um in 32 px .* reads 112 um .*`tile_um=112`"):
        run_tasks(["retrieval"], other, tiny_shards, tiny_shards, TaskOptions(n_bootstrap=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "pathways"], "give a GMT file with --gene-sets"),
        (["--encoder", "colour"], "used by downstream tasks only"),
        (["--tasks", "probe", "--encoder", "colour"], "colour is scored already; leave it out"),
        (["--tasks", "probe", "--encoder", "timm:test_vit", "timm:test_vit"], "timm:test_vit: is named more than once"),
        (["--tasks", "domains", "--labels", "none.tsv"], "none.tsv: no such file"),
    ],
)
def test_errors_come_before_the_work(quick: Path, tiny_shards: ShardSet, tmp_path: Path, capsys, options, message: str):
    arguments = ["evaluate", str(quick), "--shards", str(tiny_shards.path), "--out", str(tmp_path), "--device", "cpu"]
    assert main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "metrics.json").exists()
