"""Scores per gene: ``genes.csv``, gene lists, validation scores of predictions, and measured next to predicted."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardSet
from comtip_shards.errors import SourceError
from scipy import sparse

import comtip_fast
from comtip_fast.cli import main
from comtip_fast.config.io import load_config
from comtip_fast.evaluation.evaluate import Evaluation, evaluate
from comtip_fast.evaluation.gene_table import COLUMNS, benjamini_hochberg, null_p_values
from comtip_fast.evaluation.metrics import partial_pcc_per_gene
from comtip_fast.evaluation.summary import summary_table
from comtip_fast.evaluation.train_reference import mean_colour
from comtip_fast.genes.vectors import GeneVectors
from comtip_fast.inference import Predictor
from comtip_fast.training.task import build_task
from testkit.tiny import SYMBOLS


@pytest.fixture(scope="module")
def evaluation(tiny_run: Path, tiny_shards: ShardSet) -> Evaluation:
    return evaluate(Predictor.load(tiny_run), tiny_shards, n_null=19)


def run_cli(run: Path, shards: ShardSet, out: Path, *more: str) -> int:
    return main(["evaluate", str(run), "--shards", str(shards.path), "--out", str(out), "--null-draws", "9", *more])


def test_p_values_are_the_share_of_draws_and_are_adjusted():
    pcc = np.array([0.5, 0.1, np.nan, 0.3])
    null = np.array([[0.6, 0.0, 0.1, np.nan], [0.1, 0.2, 0.1, 0.1], [0.5, 0.0, 0.1, 0.2]])
    np.testing.assert_allclose(null_p_values(pcc, null), [3 / 4, 2 / 4, np.nan, 1 / 3])
    assert np.isnan(null_p_values(pcc, np.zeros((0, 4)))).all()
    # Worked example: the largest p stays, the others are scaled by n / rank and adjusted to be monotone.
    p = np.array([0.01, 0.04, 0.03, np.nan, 0.005])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.02, 0.04, 0.04, np.nan, 0.02])
    assert np.isnan(benjamini_hochberg(np.array([np.nan]))).all()
    from scipy.stats import false_discovery_control

    many = np.random.default_rng(0).random(200)
    np.testing.assert_allclose(benjamini_hochberg(many), false_discovery_control(many))


def test_genes_csv_agrees_with_an_independent_computation(
    evaluation: Evaluation, tiny_run: Path, tiny_shards: ShardSet, tmp_path: Path
):
    assert run_cli(tiny_run, tiny_shards, tmp_path) == 0
    table = pd.read_csv(tmp_path / "genes.csv")
    assert tuple(table.columns) == COLUMNS
    assert set(table["key"]) == {g.key for g in evaluation.predictor.bundle.genes}
    data = evaluation.sections[0]
    number = tiny_shards.section_number("x1")
    spots = tiny_shards.select(sections=[number])
    counts, tiles = tiny_shards.counts(spots).toarray(), tiny_shards.tiles(spots)
    depth = counts.sum(1, keepdims=True)
    row = {g.key: i for i, g in enumerate(tiny_shards.genes)}
    covariates = np.column_stack([mean_colour(tiles), np.log1p(depth[:, 0])])
    for i, key in enumerate(data.keys):
        line = table[table["key"] == key].iloc[0]
        gene = tiny_shards.genes[row[key]]
        assert (line["gene"], line["ensembl"]) == (gene.symbol, gene.ensembl)
        measured = np.log1p(counts[:, row[key]] / depth[:, 0] * 1e4)
        predicted = data.predicted["cp10k"][:, i]
        assert line["pcc"] == pytest.approx(np.corrcoef(measured, predicted)[0, 1], abs=1e-4)
        partial = partial_pcc_per_gene(measured[:, None], predicted[:, None], covariates)[0]
        assert line["pcc_partial"] == pytest.approx(partial, abs=1e-4)
        assert line["detection"] == pytest.approx((counts[:, row[key]] > 0).mean(), abs=1e-5)
    mean = table[table["most_variable"] == 1]["pcc"].fillna(0).mean()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["sections"]["x1"]["zero_shot"]["cp10k"]["mean_pcc_50_hvg"] == pytest.approx(mean, abs=1e-5)
    assert (table["null_p"] >= 1 / 10).all()
    assert (table["null_p_bh"] >= table["null_p"] - 1e-12).all()


def test_genes_csv_says_how_a_gene_was_seen(evaluation: Evaluation):
    seen = evaluation.gene_table().set_index("key")["seen"]
    bundle = evaluation.predictor.bundle
    assert (seen[[g.key for g in bundle.genes if g.trained]] == "trained with image").all()
    assert (seen[[g.key for g in bundle.genes if g.held_out]] == "held out").all()


def test_a_gene_outside_of_the_model_is_seen_by_name_or_vector(
    tiny_overrides: list[str], tiny_shards: ShardSet, tmp_path: Path
):
    import torch

    few = build_task(load_config(None, [*tiny_overrides, "genes.per_cohort=12"]), torch.device("cpu"))
    few.export(tmp_path / "export")
    predictor = Predictor.load(tmp_path / "export")
    outside = [g.symbol for g in tiny_shards.genes if g.key not in {x.key for x in predictor.bundle.genes}]
    one, two = outside[:2]
    keys = [*predictor.trained_genes, f"human:{two}"]
    rng = np.random.default_rng(0)
    vectors = GeneVectors(
        keys,
        rng.normal(size=(len(keys), 3)).astype(np.float32),
        np.ones((len(keys), 4), np.float32),
        np.ones(len(keys), np.float32),
    )
    with_vectors = Predictor(predictor.bundle, vectors=vectors)
    table = evaluate(with_vectors, tiny_shards, genes=[one, two], n_null=2).gene_table().set_index("gene")["seen"]
    assert table.to_dict() == {one: "name only", two: "name and gene vector"}


def test_two_models_are_compared_on_the_same_listed_genes(
    tiny_run: Path, tiny_shards: ShardSet, tiny_overrides: list[str], tmp_path: Path
):
    import torch

    few = build_task(load_config(None, [*tiny_overrides, "genes.per_cohort=12"]), torch.device("cpu"))
    few.export(tmp_path / "export")
    genes = ["CD74", "ERBB2", "GAPDH", *SYMBOLS[10:14]]
    (tmp_path / "list.txt").write_text("gene\n" + "\n".join(genes) + "\n")
    scores = []
    for run in (tiny_run, tmp_path / "export"):
        out = tmp_path / f"scores_{run.name}"
        more = ["--genes", f"@{tmp_path / 'list.txt'}", "--train-shards", str(tiny_shards.path)]
        assert run_cli(run, tiny_shards, out, *more) == 0
        table = pd.read_csv(out / "genes.csv")
        assert table["gene"].tolist() == genes
        entry = json.loads((out / "metrics.json").read_text())["sections"]["x1"]
        assert entry["hvg_from"] == "gene list"
        assert entry["genes_50_hvg"] == table["key"].tolist()
        for score in ("mean_pcc_all", "mean_pcc_50_hvg"):
            assert entry["zero_shot"]["cp10k"][score] == pytest.approx(table["pcc"].fillna(0).mean(), abs=1e-5)
        assert entry["n_genes_all"] == len(table)
        assert entry["ridge_colour"]["cp10k"] is not None
        scores.append(entry["ridge_colour"]["cp10k"]["mean_pcc_all"])
        message = f"x1 measured {len(table)} of them, of which no run trained {entry['n_genes_unseen']};"
        assert message in " ".join((out / "report.html").read_text().split())
    assert scores[0] == pytest.approx(scores[1]), "the baseline does not depend on the model's genes"


def test_genes_that_a_section_did_not_measure_are_recorded(evaluation: Evaluation, tiny_shards: ShardSet):
    result = evaluate(evaluation.predictor, tiny_shards, genes=["TTN", "CD74", "ALB"], n_null=2)
    assert result.metrics["sections"]["x1"]["genes_not_measured"] == ["TTN", "ALB"]
    assert result.gene_table()["gene"].tolist() == ["CD74"]
    unseen = evaluate(
        evaluation.predictor, tiny_shards, genes=["CD74", evaluation.predictor.held_out_genes[0][6:]], n_null=2
    )
    assert "first 50" in summary_table(unseen.metrics)
    assert "x1: measured 2 of the listed genes; no run trained 1 of these, but ridge" in summary_table(unseen.metrics)


BAD_LISTS = {
    "unknown": (["CD74", "NOTAGENE", "ALSONOT"], r"2 of 3 are not human genes \(NOTAGENE, ALSONOT\); give"),
    "twice": (["CD74", "ERBB2", "CD74"], "CD74 is listed more than once; name each gene once"),
    "two names of one gene": (["ERBB2", "HER2"], r"ERBB2 and HER2 are the same gene \(human:ERBB2\)"),
    "empty": ([], "the list is empty"),
    "not measured": (["TTN", "ALB"], "measured none of the 2 genes"),
    "another species": (["ENSMUSG00000062312"], "not human genes"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_bad_list_is_refused(case: str, evaluation: Evaluation, tiny_shards: ShardSet):
    genes, message = BAD_LISTS[case]
    with pytest.raises(ValueError, match=message):
        evaluate(evaluation.predictor, tiny_shards, genes=genes, n_null=2)


def test_a_bad_list_on_the_command_line_is_an_error_with_its_reason(
    tiny_run: Path, tiny_shards: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert run_cli(tiny_run, tiny_shards, tmp_path / "a", "--genes", f"@{tmp_path / 'none.txt'}") == 2
    assert "no such file" in capsys.readouterr().err
    assert run_cli(tiny_run, tiny_shards, tmp_path / "b", "--genes", "NOTAGENE") == 2
    assert "section x1: 1 of 1 are not human genes (NOTAGENE)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_cli(tiny_run, tiny_shards, tmp_path / "c", "--null-draws", "-1")
    assert "--null-draws: '-1': give an integer of at least 0" in capsys.readouterr().err


def test_predictions_have_ensembl_ids_and_validation_scores(tiny_run: Path, tiny_shards: ShardSet, tmp_path: Path):
    model = comtip_fast.load(tiny_run, "cpu")
    scores = model.predictor.lineage.own.gene_scores
    var = model.predict(f"{tiny_shards.path}:x1", ["ERBB2", "TTN"]).var
    assert var.loc["ERBB2", "ensembl"] == "ENSG00000141736"
    assert var.loc["ERBB2", "validation_pcc"] == scores["human:ERBB2"]
    assert np.isnan(var.loc["TTN", "validation_pcc"])
    # The score of a gene is its correlation on the validation section, as a user computes it.
    joined = model.compare(f"{tiny_shards.path}:v1")
    for key, pcc in zip(joined.var["key"], joined.var["pcc"], strict=True):
        assert scores[key] == pytest.approx(np.nan_to_num(pcc), abs=2e-3)
    assert model.predictor.lineage.own.validation["human_breast"] > 0.3
    from comtip_fast.data.h5ad import write_h5ad

    write_h5ad(joined, tmp_path / "x.h5ad")
    again = ad.read_h5ad(tmp_path / "x.h5ad")
    np.testing.assert_allclose(again.var["validation_pcc"], joined.var["validation_pcc"])


def test_a_comparison_names_the_runs_that_learnt_from_the_section(
    tiny_run: Path, tiny_shards: ShardSet, visium_like: ad.AnnData, caplog: pytest.LogCaptureFixture
):
    model = comtip_fast.load(tiny_run, "cpu")
    run = model.predictor.config.name

    def seen(section: str | ad.AnnData, **facts: str) -> tuple[str, str, bool]:
        caplog.clear()
        record = model.compare(section, ["ERBB2"], facts=facts or None).uns["comtip"]
        return record["section_seen_by"], record["donor_seen_by"], "are not scores on new data" in caplog.text

    assert seen(f"{tiny_shards.path}:x1") == ("none", "none", False)
    assert seen(f"{tiny_shards.path}:t1") == (run, run, True)
    assert f"section t1: the model has learnt from it ({run})" in caplog.text
    # The donor of an AnnData is unknown unless it is stated; the section itself is recognised.
    assert seen(visium_like, species="human") == ("none", "unknown", False)
    assert seen(visium_like, species="human", donor="donor_a") == ("none", run, True)
    assert f"the model has learnt from another section of its donor ({run})" in caplog.text


def test_a_prediction_counts_the_untrained_genes_that_have_a_vector(
    tiny_run: Path, tiny_shards: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture
):
    keys = [*Predictor.load(tiny_run).trained_genes[:3], "human:ALB"]
    arrays = np.random.default_rng(0).normal(size=(4, 2)), np.tile([0.0, 1.0, 0.0, 1.0], (4, 1)), np.ones(4)
    GeneVectors(keys, *(a.astype(np.float32) for a in arrays), {}).save(tmp_path / "v.safetensors")
    command = [
        "predict",
        str(tiny_run),
        f"{tiny_shards.path}:x1",
        "--genes",
        "ERBB2",
        "TTN",
        "ALB",
        "--out",
        str(tmp_path / "x.h5ad"),
    ]
    assert main([*command, "--gene-vectors", str(tmp_path / "v.safetensors")]) == 0
    found = capsys.readouterr().out
    assert "(2 never seen, 1 trained; 1 of the genes that were not trained have a gene vector)" in found


@pytest.fixture
def visium_like(tiny_run: Path, tiny_shards: ShardSet) -> ad.AnnData:
    """The test section as an AnnData with an image and raw counts, in another order of spots and genes."""
    opened = comtip_fast.load(tiny_run, "cpu").embed(f"{tiny_shards.path}:x1")
    number = tiny_shards.section_number("x1")
    counts = tiny_shards.counts(tiny_shards.source_order(number)).toarray()
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(len(counts)), rng.permutation(counts.shape[1])
    return ad.AnnData(
        X=sparse.csr_matrix(counts[rows][:, columns].astype(np.float32)),
        obs=opened.obs.iloc[rows],
        var=pd.DataFrame(index=[tiny_shards.genes[i].symbol for i in columns]),
        obsm={"spatial": opened.obsm["spatial"][rows]},
        uns={"spatial": opened.uns["spatial"]},
    )


def test_an_anndata_is_compared_with_its_own_counts(visium_like: ad.AnnData, tiny_run: Path, tmp_path: Path):
    model = comtip_fast.load(tiny_run, "cpu")
    genes = ["CD74", "TTN", "ERBB2"]
    joined = model.compare(visium_like, genes, facts={"species": "human"})
    counts = visium_like.X.toarray()
    want = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    for gene in ("CD74", "ERBB2"):
        i, j = joined.var_names.get_loc(gene), visium_like.var_names.get_loc(gene)
        measured = joined.layers["measured_log1p_cp10k"][:, i]
        np.testing.assert_allclose(measured, want[:, j], rtol=1e-4)
        np.testing.assert_allclose(joined.layers["measured_log1p_raw"][:, i], np.log1p(counts[:, j]), rtol=1e-5)
        pcc = np.corrcoef(measured, joined.layers["log1p_cp10k"][:, i])[0, 1]
        assert joined.var.loc[gene, "pcc"] == pytest.approx(pcc, abs=1e-4)
        assert joined.var.loc[gene, "detection"] == pytest.approx((counts[:, j] > 0).mean())
    assert joined.var["measured"].tolist() == [True, False, True]
    assert np.isnan(joined.var.loc["TTN", "pcc"])
    assert np.isnan(joined.layers["measured_log1p_cp10k"][:, 1]).all()
    assert joined.obs_names.tolist() == visium_like.obs_names.tolist()
    # A file gives the same; counts may be in a layer while X is normalised.
    visium_like.layers["umis"] = visium_like.X.copy()
    visium_like.X = sparse.csr_matrix(want.astype(np.float32))
    visium_like.write_h5ad(tmp_path / "s.h5ad")
    options = comtip_fast.CountOptions(layer="umis")
    again = model.compare(tmp_path / "s.h5ad", genes, facts={"species": "human"}, counts=options)
    np.testing.assert_array_equal(again.var["pcc"], joined.var["pcc"])


def test_a_comparison_without_counts_or_genes_is_refused(visium_like: ad.AnnData, tiny_run: Path):
    model = comtip_fast.load(tiny_run, "cpu")
    with pytest.raises(ValueError, match="measured none of the 1 genes"):
        model.compare(visium_like, ["TTN"], facts={"species": "human"})
    visium_like.X = visium_like.X * 0.5
    with pytest.raises(SourceError, match="count"):
        model.compare(visium_like, ["CD74"], facts={"species": "human"})
