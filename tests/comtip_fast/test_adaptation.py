"""Adaptation to a section: its blocks are apart, its correction is the closed form, and its lineage names the section."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardSet, SourceError
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import open_source

import comtip_fast
from comtip_fast.adaptation import correction as closed_form
from comtip_fast.adaptation import run as adaptation
from comtip_fast.adaptation.blocks import split_blocks
from comtip_fast.adaptation.correction import Correction, base_head, corrected_head, fit_correction, with_head
from comtip_fast.adaptation.section import _ridge_inputs, read_section, seen_before
from comtip_fast.cli import main
from comtip_fast.evaluation.evaluate import choose_sections, evaluate
from comtip_fast.evaluation.folds import spatial_folds
from comtip_fast.evaluation.seen import section_facts
from comtip_fast.export import Bundle
from comtip_fast.inference import GeneQuery, ImageFeatures, Predictor
from comtip_fast.lineage import Lineage, LineageRun, LineageSection
from comtip_fast.models.readout.features import ReadoutSettings
from comtip_fast.models.readout.heads import NORMS, CohortHead, NormHead, Readout
from comtip_fast.models.readout.kernel_map import FeatureMap, KernelMap
from comtip_fast.shards import stated_options
from testkit.tiny import TinySection, write_tiny_source

TILE_UM = 224.0


def lattice(side: int = 14, pitch: float = 200.0) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * pitch


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_tile_of_a_test_spot_overlaps_one_of_a_fit_spot(fraction: float, number: int):
    xy = lattice(20)
    split = split_blocks(xy, fraction, TILE_UM, seed=0, number=number, section="s")
    assert split.fit.size == round(fraction * 400)
    assert not np.intersect1d(split.fit, split.test).size
    apart = np.abs(xy[split.fit][:, None] - xy[split.test][None]).max(-1)
    assert apart.min() >= TILE_UM
    # Every spot outside of the margin is tested.
    rest = np.setdiff1d(np.arange(400), np.concatenate([split.fit, split.test]))
    if rest.size:
        assert np.abs(xy[split.fit][:, None] - xy[rest][None]).max(-1).min(0).max() < TILE_UM
    # Fit spots form blocks: most have a fit spot next to them.
    near = np.abs(xy[split.fit][:, None] - xy[split.fit][None]).max(-1)
    np.fill_diagonal(near, np.inf)
    assert (near.min(1) <= 200).all()
    again = split_blocks(xy, fraction, TILE_UM, seed=0, number=number, section="s")
    assert (again.fit == split.fit).all()
    assert (split_blocks(xy, fraction, TILE_UM, seed=1, number=number, section="s").fit != split.fit).any()


def test_too_few_spots_are_refused():
    with pytest.raises(ValueError, match=r"section s: 0.05 of 49 spots are 2, but adaptation needs at least 10"):
        split_blocks(lattice(7), 0.05, TILE_UM, seed=0, number=0, section="s")
    with pytest.raises(
        ValueError, match=r"section s: 16 spots, but adaptation needs at least 20, 10 to fit on and 10 to test"
    ):
        split_blocks(lattice(4), 0.5, TILE_UM, seed=0, number=0, section="s")
    with pytest.raises(
        ValueError, match=r"only \d of 49 spots are at least 900 um from the 12 .*give a `fraction` below 0.25 or"
    ):
        split_blocks(lattice(7), 0.25, 900, seed=0, number=0, section="s")
    with pytest.raises(ValueError, match=r"from the 10 spots to fit on, but a test needs 10; give a larger section"):
        split_blocks(lattice(7), 0.2, 900, seed=0, number=0, section="s")


def test_folds_are_compact_and_of_equal_size():
    xy = lattice(10)
    fold = spatial_folds(xy)
    assert np.bincount(fold).tolist() == [25] * 4
    for f in range(4):
        assert np.ptp(xy[fold == f], axis=0).max() <= 5 * 200


# -- the correction -----------------------------------------------------------------------------------------

F, G = 6, 8


def problem(strength: float, n: int = 120) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features, measured and predicted expression, and positions; the prediction lacks a part of the given strength."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(n, F))
    known = x[:, :3] @ rng.normal(size=(3, G))
    missing = x[:, 3:] @ rng.normal(size=(F - 3, G))
    return x, 2 + known + strength * missing + 0.5 * rng.normal(size=(n, G)), known, rng.uniform(size=(n, 2))


def test_the_correction_is_ridge_regression_of_the_residuals(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(closed_form, "ALPHAS", (0.7,))
    monkeypatch.setattr(closed_form, "PROGRAMMES", (0,))
    x, measured, predicted, xy = problem(1.0)
    found = fit_correction({"frozen": x}, measured, predicted, spatial_folds(xy), np.arange(G))
    assert found is not None
    residual = measured - predicted
    centred = residual - residual.mean(0)
    weight = np.linalg.solve(x.T @ x + 0.7 * len(x) * np.eye(F), x.T @ centred)
    np.testing.assert_allclose(found.predict(x), residual.mean(0) + x @ weight, atol=1e-8)
    assert found.facts["cv_gain"] > closed_form.GAIN


def test_offsets_between_folds_do_not_hide_a_gain():
    """A constant does not change a PCC, so parts of the section that differ in level must not decide about a correction."""
    x, measured, predicted, xy = problem(1.0)
    fold = spatial_folds(xy)
    found = fit_correction({"frozen": x}, measured + 5.0 * fold[:, None], predicted, fold, np.arange(G))
    assert found is not None
    assert found.facts["cv_gain"] > 0.05


def test_the_strongest_penalty_within_one_standard_error_is_used(monkeypatch: pytest.MonkeyPatch):
    x, measured, predicted, xy = problem(1.0)
    fold, chosen = spatial_folds(xy), []
    for alphas in ((1e-6, 1e-5), (1e-6, 1e-5, 1e6)):
        monkeypatch.setattr(closed_form, "ALPHAS", alphas)
        found = fit_correction({"frozen": x}, measured, predicted, fold, np.arange(G))
        assert found is not None
        chosen.append(found.facts["alpha"])
    # Two penalties that differ by nothing: the stronger. One that removes the correction: not used.
    assert chosen == [1e-5, 1e-5]


def test_without_a_gain_there_is_no_correction():
    x, measured, predicted, xy = problem(0.0)
    noise = np.random.default_rng(1).normal(size=x.shape)
    assert fit_correction({"frozen": noise}, measured, predicted, spatial_folds(xy), np.arange(G)) is None


def test_the_block_that_helps_is_chosen():
    x, measured, predicted, xy = problem(1.0)
    noise = np.random.default_rng(1).normal(size=x.shape)
    found = fit_correction({"vector": noise, "frozen": x}, measured, predicted, spatial_folds(xy), np.arange(G))
    assert found is not None
    assert found.block == "frozen"


def head(seed: int, cohort: str, keys: list[str], mix: dict[str, float], *, kernel: bool = False) -> CohortHead:
    rng = np.random.default_rng(seed)
    settings = ReadoutSettings(views=1, radii=(), vector_dim=2)
    n_columns = {b: settings.columns(b, F).size for b in ("vector", "frozen")}
    maps = {b: FeatureMap() for b in n_columns}
    if kernel:
        maps = {
            b: FeatureMap([KernelMap.fit(rng.normal(size=(9, n)), np.ones(n))], False) for b, n in n_columns.items()
        }

    def part(block: str) -> NormHead:
        rows = 9 if kernel else n_columns[block]
        std = rng.uniform(0.5, 1, len(keys))
        return NormHead(rng.normal(size=(rows, 3)), rng.normal(size=(3, len(keys))), rng.normal(size=len(keys)), std)

    blocks = {b: {norm: part(b) for norm in NORMS} for b in ("vector", "frozen")}
    return CohortHead(cohort, keys, np.zeros(F), np.ones(F), blocks, dict.fromkeys(NORMS, mix), maps)


MIXES = [{"vector": 0.3, "frozen": 0.4, "levels": 0.3}, {"vector": 0.0, "frozen": 0.6, "levels": 0.4}]


@pytest.mark.parametrize("kernels", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("cohort", ["human_breast", "human_skin"])
def test_the_base_head_predicts_as_the_readout(cohort: str, kernels: tuple[bool, bool]):
    """Of the own cohort, or the mean over heads of the species for a cohort without a head; of kernel values and of features."""
    keys = [f"human:G{i}" for i in range(G)]
    heads = [
        head(1, "human_breast", keys[:6], MIXES[1], kernel=kernels[0]),
        head(2, "human_colon", keys[3:], MIXES[0], kernel=kernels[1]),
        head(3, "mouse_bulb", ["mouse:G1", "mouse:G2"], MIXES[0]),
    ]
    readout = Readout(ReadoutSettings(views=1, radii=(), vector_dim=2), heads)
    base = base_head(readout, cohort, "human")
    assert base.cohort == cohort
    x = np.random.default_rng(0).normal(size=(40, F))
    want, known = Readout(readout.settings, heads[:2]).predict(x, base.keys, cohort)
    got, same = with_head(readout, base).predict(x, base.keys, cohort)
    assert known.all()
    assert same.all()
    for norm in NORMS:
        np.testing.assert_allclose(got[norm], want[norm], atol=1e-5)
    for mix in base.mix.values():
        assert sum(mix.values()) == pytest.approx(1)
        assert all(mix[b] > 0 for b in base.blocks)


@pytest.mark.parametrize("kernel", [False, True])
def test_a_corrected_head_predicts_the_sum(kernel: bool):
    keys = [f"human:G{i}" for i in range(G)]
    own = head(1, "human_breast", keys, MIXES[1], kernel=kernel)
    readout = Readout(ReadoutSettings(views=1, radii=(), vector_dim=2), [own])
    base = base_head(readout, "human_breast", "human")
    rng = np.random.default_rng(3)
    columns, loadings = np.array([6, 1, 4]), rng.normal(size=(2, 3))
    added = Correction("vector", NormHead(rng.normal(size=(2, 2)), loadings, rng.normal(size=3), np.ones(3) * 2), {})
    new = corrected_head(base, columns, {"cp10k": added, "raw": None})
    x = rng.normal(size=(40, F))
    x = (x - x.mean(0)) / x.std(0)
    before, _ = with_head(readout, base).predict(x, keys, "human_breast")
    after, _ = with_head(readout, new).predict(x, keys, "human_breast")
    # The readout's share of the prediction is 1 - levels.
    difference = (after["cp10k"] - before["cp10k"]) * (1 - base.levels)
    np.testing.assert_allclose(difference[:, columns], added.predict(x[:, :2]), atol=1e-5)
    assert np.abs(difference[:, [0, 2, 3, 5, 7]]).max() < 1e-6
    np.testing.assert_allclose(after["raw"], before["raw"], atol=1e-6)
    # A second correction, of the other normalisation, is added to the first.
    again = corrected_head(new, columns, {"cp10k": None, "raw": added})
    both, _ = with_head(readout, again).predict(x, keys, "human_breast")
    np.testing.assert_allclose(both["cp10k"], after["cp10k"], atol=1e-6)
    difference = (both["raw"] - before["raw"]) * (1 - base.levels)
    np.testing.assert_allclose(difference[:, columns], added.predict(x[:, :2]), atol=1e-5)


# -- a complete adaptation ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A section of 196 spots of a new donor whose genes follow the image, and another section of that donor."""
    folder = tmp_path_factory.mktemp("adapt")
    sections = [TinySection("n1", "donor_new", "test"), TinySection("n2", "donor_new", "test")]
    source = write_tiny_source(folder / "source", sections, side=14, seed=7, pitch_px=20).parent
    table = pd.read_csv(source / "manifest.tsv", sep="\t")
    table["licence"] = "CC-BY-4.0"
    table.to_csv(source / "manifest.tsv", sep="\t", index=False)
    build_shards(open_source(source), folder / "set", tile_px=32, tile_um=TILE_UM, min_mpp=5.0)
    return ShardSet(folder / "set")


def anndata_of(shards: ShardSet, number: int, path: Path, without: Sequence[str] = ()) -> Path:
    """Write a section as an AnnData with an image, in the order of its source and without some genes."""
    spots, meta = shards.source_order(number), shards.manifest.sections[number]
    names = [g.symbol for g in shards.genes]
    data = ad.AnnData(shards.counts(spots).astype(np.float32), var=pd.DataFrame(index=names))
    overview, mpp = shards.overview(number)
    data.obsm["spatial"] = shards.spots.loc[spots, ["x_px", "y_px"]].to_numpy(float)
    factors = {
        "tissue_hires_scalef": meta.mpp / mpp,
        "spot_diameter_fullres": 100 / meta.mpp,
        "microns_per_pixel": meta.mpp,
    }
    data.uns["spatial"] = {path.stem: {"images": {"hires": overview}, "scalefactors": factors}}
    data[:, [n for n in names if n not in without]].write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def adapted(tiny_run: Path, large: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapted") / "out"
    arguments = ["adapt", str(tiny_run), f"{large.path}:n1", "--out", str(out), "--fraction", "0.2", "--splits", "2"]
    assert main([*arguments, "--device", "cpu"]) == 0
    return out


def test_the_table_compares_all_methods_on_the_same_spots(adapted: Path):
    table = pd.read_csv(adapted / "adaptation.csv")
    assert set(table["method"]) == set(adaptation.LABELS)
    assert (table.groupby("split")[["fit_spots", "test_spots"]].nunique() == 1).all(axis=None)
    assert len(table) == 2 * 2 * 5
    assert table["mean_pcc_50_hvg"].between(-1, 1).all()
    spots = pd.read_csv(adapted / "spots.csv")
    assert (spots["first_split"] == "fit").sum() == spots["adapted_to"].sum() == round(0.2 * 196)
    assert (spots.loc[spots["adapted_to"], "first_split"] == "fit").all()


def test_scores_do_not_depend_on_counts_of_test_spots_in_the_fit(tiny_run: Path, large: ShardSet):
    """With other counts outside of the fit spots, adapted predictions of all spots are the same."""
    predictor = Predictor.load(tiny_run)
    section = read_section(predictor, f"{large.path}:n1", stated_options(None, None, None))
    split = split_blocks(section.xy_um, 0.2, TILE_UM, seed=0, number=0, section="n1")
    one = adaptation._fit(predictor, section, split.fit, [split.fit, split.test])
    others = np.setdiff1d(np.arange(196), split.fit)
    for values in section.measured.values():
        values[others] = np.random.default_rng(0).permutation(values[others])
    two = adaptation._fit(predictor, section, split.fit, [split.fit, split.test])
    for norm in NORMS:
        np.testing.assert_array_equal(one.adapted[norm], two.adapted[norm])


def test_features_of_test_spots_do_not_depend_on_tiles_of_fit_spots(tiny_run: Path, large: ShardSet):
    predictor = Predictor.load(tiny_run)
    section = read_section(predictor, f"{large.path}:n1", stated_options(None, None, None))
    split = split_blocks(section.xy_um, 0.2, TILE_UM, seed=0, number=0, section="n1")
    parts = [split.fit, split.test]
    before = adaptation._features(predictor, section, parts).readout_NF.copy()
    section.features.readout_NF[split.fit] += 5
    after = adaptation._features(predictor, section, parts).readout_NF
    np.testing.assert_array_equal(before[split.test], after[split.test])
    assert (before[split.fit] != after[split.fit]).any()


@pytest.mark.parametrize("radii", [(1.3, 3.4), (1.3,), ()])
def test_ridge_on_frozen_features_uses_all_of_them(radii: tuple[float, ...]):
    """The features of a section to adapt to have no means over neighbours, so none of them is left out."""
    views = np.arange(5 * 12, dtype=np.float32).reshape(5, 12)
    settings = ReadoutSettings(radii=radii, vector_dim=4, stages=False)
    predictor = SimpleNamespace(
        bundle=SimpleNamespace(readout=Readout(settings, [])),
        model=SimpleNamespace(vision=SimpleNamespace(stem=SimpleNamespace(width=4))),
        normalises_stain=False,
    )
    opened = SimpleNamespace(tiles=np.zeros((5, 2, 2, 3), np.uint8), stain=None)
    features = ImageFeatures(np.zeros((5, 4), np.float32), np.zeros((5, 3), np.float32), views)
    (frozen,) = _ridge_inputs(predictor, opened, features)["ridge_frozen"].values()
    np.testing.assert_array_equal(frozen, views[:, 4:])


def test_a_section_that_differs_from_the_model_is_learnt(
    tiny_run: Path, large: ShardSet, monkeypatch: pytest.MonkeyPatch
):
    """With genes exchanged in the section, the unadapted model is wrong; adaptation to some spots predicts the others."""
    real = adaptation.read_section

    def exchanged(*args):
        section = real(*args)
        for values in section.measured.values():
            values[:] = np.roll(values, 1, axis=1)  # neighbours in the list of genes have opposite signs
        return section

    monkeypatch.setattr(adaptation, "read_section", exchanged)
    result = comtip_fast.adapt(tiny_run, f"{large.path}:n1", fraction=0.3, splits=2, device="cpu")
    summary = result.summary().set_index("method")
    assert summary.loc["adapted", "mean_pcc_50_hvg"] > summary.loc["unadapted", "mean_pcc_50_hvg"] + 0.1
    assert summary.loc["adapted", "above_unadapted"] == "2 of 2"
    # The adapted model predicts, from its export's contents alone, what the fit predicted.
    section = exchanged(result.predictor, f"{large.path}:n1", stated_options(None, None, None))
    split = split_blocks(section.xy_um, 0.3, TILE_UM, seed=0, number=0, section="n1")
    parent = Predictor.load(tiny_run)
    parts = [np.arange(196)]
    want = adaptation._fit(parent, section, split.fit, parts).adapted
    known = {g.key: g for g in result.predictor.bundle.genes}
    queries = [GeneQuery(known[k].symbol, known[k].name, k) for k in section.keys]
    features = adaptation._features(parent, section, parts)
    got = result.predictor.predict(features, queries, cohort=section.cohort)
    for norm in NORMS:
        np.testing.assert_allclose(got[norm], want[norm], atol=2e-3)
    facts = result.predictor.bundle.readout.heads[-1].facts
    assert facts["correction"]["cp10k"]["cv_gain"] > 0


def test_the_lineage_carries_the_section_and_its_donor(adapted: Path, tiny_run: Path, large: ShardSet):
    bundle = Bundle.load(adapted / "export")
    parent = Bundle.load(tiny_run / "export")
    lineage = bundle.lineage
    assert [run.name for run in lineage.ancestors] == [run.name for run in parent.lineage.runs]
    (section,) = lineage.own.sections
    assert (section.section_id, section.donor, section.split) == ("n1", "donor_new", "train")
    assert section.picture
    assert lineage.runs_that_trained_on("donor_new") == [lineage.own.name]
    assert "CC-BY-4.0" in lineage.licences()
    card = (adapted / "export/README.md").read_text()
    assert "Section n1 of donor donor_new: the readout was adapted to 39 of its spots" in card
    facts = json.loads((adapted / "adaptation.json").read_text())
    assert facts["section"]["donor"] == "donor_new"
    assert facts["margin_um"] == TILE_UM
    # Both sections of the donor are reported as seen, and the section is not scored by default.
    predictor = Predictor.load(adapted)
    assert choose_sections(predictor, large, None) == [large.section_number("n2")]
    assert section_facts(predictor, large, large.section_number("n1"))["section_seen_in_training"]
    assert section_facts(predictor, large, large.section_number("n2"))["donor_seen_by"] == [lineage.own.name]


def test_an_adapted_model_is_evaluated_and_adapted_again(adapted: Path, tiny_shards: ShardSet, large: ShardSet):
    predictor = Predictor.load(adapted)
    result = evaluate(predictor, tiny_shards, sections=["x1"], train_shards=tiny_shards, n_null=2)
    assert not result.metrics["sections"]["x1"]["donor_seen_in_training"]
    again = comtip_fast.adapt(adapted, f"{large.path}:n2", fraction=0.2, splits=1, device="cpu")
    assert len(again.predictor.lineage.runs) == len(predictor.lineage.runs) + 1
    assert again.predictor.lineage.own.name == f"{predictor.config.name}, adapted to n2"
    assert [h.cohort for h in again.predictor.bundle.readout.heads] == ["human_breast"]


def test_a_section_that_a_run_learnt_from_is_reported():
    facts = {"dataset": "d", "species": "human", "tissue": "breast"}
    sections = [
        LineageSection(section_id=i, donor=donor, split=split, **facts)
        for i, donor, split in (("t", "a", "train"), ("v", "b", "val"), ("x", "c", "test"))
    ]
    predictor = SimpleNamespace(lineage=Lineage(runs=(LineageRun(name="r", sections=tuple(sections)),)))
    found = [seen_before(predictor, s) for s in sections]  # type: ignore[arg-type]
    assert [f["section_seen_by"] for f in found] == [["r"], ["r"], []]
    assert [f["donor_seen_by"] for f in found] == [["r"], [], []]
    predictor.lineage = replace(predictor.lineage, parents_known=False)
    assert seen_before(predictor, sections[2]) == {"section_seen_by": None, "donor_seen_by": None}  # type: ignore[arg-type]


def test_adapting_again_to_the_same_section_says_that_its_test_spots_are_not_new(
    adapted: Path, large: ShardSet, caplog: pytest.LogCaptureFixture
):
    own = Predictor.load(adapted).lineage.own.name
    assert json.loads((adapted / "adaptation.json").read_text())["section_seen_by"] == []
    again = comtip_fast.adapt(adapted, f"{large.path}:n1", fraction=0.2, splits=1, device="cpu")
    assert again.facts["section_seen_by"] == again.facts["donor_seen_by"] == [own]
    assert f"section n1: the model has learnt from it ({own}), so its test spots are no new data" in caplog.text
    scored = again.predictor.lineage.own.scored_on
    assert scored["human:GAPDH"] == "test spots of n1, which training used"


def test_predictions_of_an_adapted_model_have_the_scores_of_the_comparison(
    tiny_run: Path, large: ShardSet, tmp_path: Path
):
    """And those of the parent for genes that the section did not measure, through a chain of adaptations."""
    parent = Predictor.load(tiny_run).lineage.own
    opened = large.section_number("n1"), large.section_number("n2")
    folder = anndata_of(large, opened[0], tmp_path / "n1.h5ad", without=["ERBB2", "CD74"])
    facts = {"species": "human", "tissue": "breast", "donor": "me", "mpp": large.manifest.sections[opened[0]].mpp}
    first = comtip_fast.adapt(tiny_run, folder, tmp_path / "a", fraction=0.3, splits=3, facts=facts, device="cpu")
    var = comtip_fast.load(tmp_path / "a", "cpu").predict(f"{large.path}:n2", ["ERBB2", "GAPDH", "TTN"]).var
    assert var["validation_on"].tolist() == [f"validation sections of {parent.name}", "test spots of n1", ""]
    assert var["validation_pcc"].iloc[0] == parent.gene_scores["human:ERBB2"]
    assert np.isnan(var["validation_pcc"].iloc[2])

    # The score is the mean over the splits of the correlation on their test spots.
    predictor = Predictor.load(tiny_run)
    section = read_section(predictor, folder, stated_options(facts, None, None))
    gene, found = section.keys.index("human:GAPDH"), []
    for number in range(3):
        split = split_blocks(section.xy_um, 0.3, TILE_UM, seed=0, number=number, section="n1")
        fitted = adaptation._fit(predictor, section, split.fit, [split.fit, split.test])
        pair = section.measured["cp10k"][split.test, gene], fitted.adapted["cp10k"][split.test, gene]
        found.append(np.corrcoef(*pair)[0, 1])
    assert var["validation_pcc"].iloc[1] == pytest.approx(np.mean(found))
    assert len(set(found)) == 3
    assert first.predictor.lineage.own.gene_scores.keys() >= set(section.keys) | {"human:ERBB2", "human:CD74"}

    only = anndata_of(large, opened[1], tmp_path / "n2.h5ad", without=["ERBB2", "GAPDH"])
    again = comtip_fast.adapt(tmp_path / "a", only, fraction=0.3, splits=1, facts=facts, device="cpu")
    origin = {key: where for key, (_, where) in again.predictor.lineage.own.scores_with_origin().items()}
    assert origin["human:ERBB2"] == f"validation sections of {parent.name}"
    assert origin["human:GAPDH"] == "test spots of n1"
    assert origin["human:CD74"] == "test spots of n2"
    assert again.predictor.lineage.own.gene_scores["human:GAPDH"] == var["validation_pcc"].iloc[1]


def test_an_anndata_states_its_donor(tiny_run: Path, large: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    n = large.section_number("n1")
    data, meta = ad.read_h5ad(anndata_of(large, n, tmp_path / "lib.h5ad")), large.manifest.sections[n]
    with pytest.raises(SourceError, match=r"section lib: `donor` is not stated; state it,"):
        comtip_fast.adapt(tiny_run, data, facts={"species": "human", "tissue": "breast", "mpp": meta.mpp}, device="cpu")
    facts = {"species": "human", "tissue": "breast", "donor": "me", "mpp": meta.mpp}
    with caplog.at_level(logging.WARNING, "comtip_fast"):
        result = comtip_fast.adapt(tiny_run, data, fraction=0.2, splits=1, facts=facts, device="cpu")
    (section,) = result.predictor.lineage.own.sections
    assert (section.donor, section.section_id) == ("me", "lib")
    # Its fingerprint identifies the section in a shard set, where it has another id.
    assert section_facts(result.predictor, large, n)["section_seen_in_training"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fraction", "1.5"], "--fraction 1.5: give a share of the spots, above 0 and at most 1"),
        (["--splits", "0"], "--splits: '0': give an integer of at least 1"),
        (["--fraction", "0.01"], "adaptation needs at least 10; give a larger --fraction"),
    ],
)
def test_bad_options_are_refused(
    tiny_run: Path,
    large: ShardSet,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "out"
    try:
        code = main(["adapt", str(tiny_run), f"{large.path}:n1", "--out", str(out), *options])
    except SystemExit as end:  # argparse
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_output_that_is_not_an_empty_folder_is_refused(
    tiny_run: Path, large: ShardSet, adapted: Path, tmp_path: Path
):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="file: exists and is not an empty folder"):
        comtip_fast.adapt(tiny_run, f"{large.path}:n1", tmp_path / "file", device="cpu")
    with pytest.raises(FileExistsError, match="is not an empty folder; give a new folder"):
        comtip_fast.adapt(tiny_run, f"{large.path}:n1", adapted, device="cpu")
