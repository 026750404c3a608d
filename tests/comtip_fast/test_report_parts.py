"""Parts of the report against direct computations: intervals, calibration, clusters, and the encoded maps."""

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from comtip_fast.constants import LAYER_CP10K, LAYER_MEASURED_CP10K
from comtip_fast.drawing import calibration_slope, calibration_table, residual_map
from comtip_fast.evaluation import figures
from comtip_fast.evaluation.evaluate import SectionData
from comtip_fast.evaluation.report import payload
from comtip_fast.evaluation.report.charts import loss_curves, ticks
from comtip_fast.evaluation.report.page import _StaticImages
from comtip_fast.evaluation.report.payload import SectionPayload, page_json
from comtip_fast.evaluation.report.summaries import BLOCKS_PER_SIDE, all_intervals, clusters, intervals
from comtip_fast.evaluation.tasks.intervals import spatial_blocks, weighted_pcc
from comtip_fast.metrics import pcc_per_gene
from comtip_fast.plots import maps, scores


def section(seed: int = 0, side: int = 12, genes: int = 5, noise: float = 0.5) -> SectionData:
    """A section whose measured maps are smooth fields, predicted with noise; the baseline is worse."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    xy = np.stack([x, y], -1).reshape(-1, 2) * 10.0
    field = np.stack([np.sin(xy[:, 0] / (20 + 7 * g)) + np.cos(xy[:, 1] / 30) for g in range(genes)], 1)
    measured = 2 + field + 0.3 * rng.normal(size=field.shape)
    predicted = 2 + field + noise * rng.normal(size=field.shape)
    every = np.arange(genes)
    names = [f"G{g}" for g in every]
    table = pd.DataFrame({"gene": names, "pcc": pcc_per_gene(measured, predicted), "pcc_partial": 0.1, "null_p": 0.5})
    return SectionData(
        section_id="s",
        cohort="human_breast",
        keys=[f"human:{n}" for n in names],
        xy=xy,
        measured={"cp10k": measured, "raw": measured},
        predicted={"cp10k": predicted, "raw": predicted},
        hvg=every,
        panel=every,
        unseen=every[:0],
        pcc=pcc_per_gene(measured, predicted),
        null_means=np.zeros(0),
        null_pcc=np.zeros((0, genes)),
        gene_table=table.assign(detection=1.0, seen="trained with image"),
        spots=np.arange(len(xy)),
        baselines={"ridge_colour": field + 3 * rng.normal(size=field.shape)},
    )


def test_weighted_pcc_is_that_of_repeated_spots():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 3)), rng.normal(size=(20, 3))
    b[:, 2] = 4.0
    times = rng.integers(0, 4, size=(6, 20))
    got = weighted_pcc(a, b, times.astype(float))
    for draw, row in zip(times, got, strict=True):
        direct = pcc_per_gene(np.repeat(a, draw, 0), np.repeat(b, draw, 0))
        np.testing.assert_allclose(row, np.nan_to_num(direct), atol=1e-10)
    assert (got[:, 2] == 0).all()


def test_intervals_contain_the_score_and_widen_with_blocks():
    data = section()
    table = intervals(data).set_index("predictor")
    model = table.loc["zero_shot"]
    assert model["mean_pcc"] == pytest.approx(pcc_per_gene(data.measured["cp10k"], data.predicted["cp10k"]).mean())
    assert model["low"] < model["mean_pcc"] < model["high"]
    assert model["blocks"] == 36
    other = table.loc["ridge_colour"]
    assert other["difference"] == pytest.approx(model["mean_pcc"] - other["mean_pcc"])
    assert 0 < other["difference_low"] < other["difference"] < other["difference_high"]
    assert model["difference_low"] == model["difference_high"] == 0
    # A difference shared by a whole block counts once, not once per spot: the interval is wider than that over single spots.
    rng = np.random.default_rng(1)
    block = spatial_blocks(data.xy, BLOCKS_PER_SIDE)
    data.predicted["cp10k"] = data.measured["cp10k"] + 2 * rng.normal(size=(36, 1))[block]
    wide = intervals(data).set_index("predictor").loc["zero_shot"]
    draws = rng.integers(len(block), size=(500, len(block)))
    weight = np.stack([np.bincount(d, minlength=len(block)) for d in draws]).astype(float)
    single = weighted_pcc(data.measured["cp10k"], data.predicted["cp10k"], weight).mean(1)
    assert wide["high"] - wide["low"] > 1.2 * (np.quantile(single, 0.975) - np.quantile(single, 0.025))


def test_means_over_the_sections_of_a_cohort_have_intervals_over_sections():
    parts = [replace(section(seed, noise=0.2 + seed), section_id=f"s{seed}") for seed in range(4)]
    alone = replace(section(9), section_id="t", cohort="mouse_brain")
    del parts[3].baselines["ridge_colour"]
    tables = [intervals(data) for data in (*parts, alone)]
    *own, mean = all_intervals([(d.cohort, t) for d, t in zip((*parts, alone), tables, strict=True)])
    assert len(own) == 5
    assert set(mean["section"]) == {"mean of 4 sections of human_breast"}, "one section of a cohort has no mean"
    mean = mean.set_index("predictor")
    of_model = [t.set_index("predictor").loc["zero_shot", "mean_pcc"] for t in tables[:4]]
    assert mean.loc["zero_shot", "mean_pcc"] == pytest.approx(np.mean(of_model))
    assert min(of_model) < mean.loc["zero_shot", "low"] < mean.loc["zero_shot", "mean_pcc"]
    assert mean.loc["zero_shot", "mean_pcc"] < mean.loc["zero_shot", "high"] < max(of_model)
    # A method without a score in a section is averaged over the others, and its difference is over these.
    assert mean["blocks"].to_dict() == {"zero_shot": 4, "ridge_colour": 3}
    difference = [t.set_index("predictor").loc["ridge_colour", "difference"] for t in tables[:3]]
    assert mean.loc["ridge_colour", "difference"] == pytest.approx(np.mean(difference))


def test_few_blocks_have_no_interval():
    data = section(side=2)
    table = intervals(data)
    assert table["blocks"][0] == 4
    assert table[["low", "high"]].isna().all(axis=None)


def test_a_section_without_the_most_variable_genes_has_no_interval_of_0():
    data = section()
    without = replace(data, hvg=data.hvg[:0], baselines={"ridge_colour": data.baselines["ridge_colour"][:, :0]})
    assert not len(intervals(without))
    shown = scores(SimpleNamespace(sections=[without, data]))
    assert [axis.get_title(loc="left") for axis in shown.axes] == ["s"]
    unseen = replace(without, unseen=data.hvg[:2])
    assert intervals(unseen)["predictor"].tolist() == ["zero_shot_unseen_genes"]
    with pytest.raises(ValueError, match="no rows"):
        scores(SimpleNamespace(sections=[without]))


def test_blocks_are_squares():
    xy = np.stack(np.meshgrid(np.arange(60.0), np.arange(30.0)), -1).reshape(-1, 2)
    block = spatial_blocks(xy, BLOCKS_PER_SIDE)
    assert len(np.unique(block)) == 6 * 4 or len(np.unique(block)) == 6 * 3
    for b in np.unique(block):
        assert np.ptp(xy[block == b], axis=0).max() <= 10


def test_calibration_by_level():
    rng = np.random.default_rng(0)
    p = rng.gamma(2, size=(200, 7))
    table = calibration_table(2 * p + 1, p)
    assert table["n"].sum() == p.size
    assert table["n"].max() - table["n"].min() <= 1
    np.testing.assert_allclose(table["measured"], 2 * table["predicted"] + 1)
    order = np.argsort(p.ravel())[:140]
    np.testing.assert_allclose(table["predicted"][0], p.ravel()[order].mean())
    np.testing.assert_allclose(table["measured_sd"][0], (2 * p + 1).ravel()[order].std())
    constant = calibration_table(p, np.ones_like(p))
    assert constant["n"].tolist() == [p.size]
    with pytest.raises(ValueError, match=r"measured has shape \(200, 7\), predicted \(7, 200\)"):
        calibration_table(p, p.T)
    slopes = calibration_slope(
        np.column_stack([2 * p[:, 0] + 1, p[:, 1]]), np.column_stack([p[:, 0], np.full(200, 0.1)])
    )
    assert slopes[0] == pytest.approx(2)
    assert np.isnan(slopes[1])


def test_the_residual_is_the_difference_of_patterns():
    x = np.array([0.0, 1, 2, 5])
    np.testing.assert_allclose(residual_map(3 * x + 7, x), 0, atol=1e-12)
    np.testing.assert_allclose(residual_map(x, np.full(4, 2.0)), (x - 2) / x.std())


def test_clusters_are_compared_with_labels():
    data = section(noise=0.1)
    truth = np.where(data.xy[:, 0] > 55, "tumour", "stroma").astype(object)
    truth[:4] = [
        "",
        "Undetermined",
        "unknown",
        "nan",
    ]  # all without a label, as for ``comtip evaluate --tasks domains``
    for values in (data.measured["cp10k"], data.predicted["cp10k"]):
        values += 4 * (data.xy[:, :1] > 55)
    spots = pd.DataFrame({"label": truth, "spot_id": [f"n{i}" for i in range(len(truth))]})
    result = SimpleNamespace(shards=SimpleNamespace(spots=spots))
    table, agreement = clusters(result, data)
    assert agreement["predicted"]["ari"] == pytest.approx(1)
    assert agreement["measured"]["nmi"] == pytest.approx(1)
    assert len(table) == len(truth) - 4
    assert set(map(tuple, table[["label", "predicted"]].to_numpy())) == {("stroma", 1), ("tumour", 2)}
    data.predicted["cp10k"] = np.random.default_rng(3).normal(size=data.predicted["cp10k"].shape)
    assert abs(clusters(result, data)[1]["predicted"]["ari"]) < 0.15
    spots["label"] = ""
    assert clusters(result, data) is None


def unpack(data: SectionData, rows: np.ndarray, packed: bytes, ranges: np.ndarray) -> np.ndarray:
    raw = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(2, len(data.keys), rows.size)
    low, high = ranges[:, None, :, None]
    return low + raw / 255 * (high - low)


def test_encoded_values_are_those_of_the_maps_within_a_quantisation_step():
    data = section()
    (rows, packed), ranges = payload._values(data, 1 << 20, 0), payload._ranges(data)
    got = unpack(data, rows, packed, ranges)
    step = (ranges[1] - ranges[0]) / 255
    for value, found in zip((data.measured, data.predicted), got, strict=True):
        assert (np.abs(found.T - value["cp10k"]) <= 0.51 * step).all()


def test_values_are_coarser_and_then_spots_are_left_out_within_the_bound():
    data = section(side=40, genes=8)
    whole = len(payload._values(data, 1 << 30, 0)[1])
    rows, packed = payload._values(data, int(whole * 4 / 3) - 1, 0)
    assert rows.size == 1600
    assert len(packed) < whole
    (rows, packed), ranges = payload._values(data, 4000, 0), payload._ranges(data)
    assert 50 <= rows.size < 1600
    assert len(packed) * 4 / 3 <= 4000
    got = unpack(data, rows, packed, ranges)[0].T
    assert (np.abs(got - data.measured["cp10k"][rows]) <= 0.51 * (ranges[1] - ranges[0]) / 15).all()


def test_the_table_of_genes_counts_towards_the_size_of_the_page(monkeypatch: pytest.MonkeyPatch):
    """With thousands of genes it is as large as the values, so values that just fit the whole budget must become coarser."""
    data = section(side=30, genes=60)
    manifest = SimpleNamespace(sections=[SimpleNamespace(spot_diameter_um=55.0, mpp=1.0)])
    overview = np.full((300, 300, 3), 200, np.uint8), 1.0
    shards = SimpleNamespace(section_number=lambda name: 0, manifest=manifest, overview=lambda number: overview)
    whole = len(payload._base64(payload._values(data, 1 << 30, 0)[1]))
    monkeypatch.setattr(payload, "VALUES_BYTES", 2 * (whole + 8))
    entry = payload.section_payload(SimpleNamespace(shards=shards), data, None, 2).data
    genes = len(json.dumps(entry["genes"], separators=(",", ":")))
    assert len(entry["values"]) + genes <= whole + 8
    assert len(entry["values"]) > whole / 2, "no more than necessary is left out"


def test_images_of_examples_exceed_their_budget_by_less_than_one(monkeypatch: pytest.MonkeyPatch):
    manifest = SimpleNamespace(sections=[SimpleNamespace(spot_diameter_um=55.0, mpp=1.0)])
    shards = SimpleNamespace(
        section_number=lambda name: 0, manifest=manifest, overview=lambda number: (np.zeros(0), 1.0)
    )
    monkeypatch.setattr(figures, "maps", lambda *_: "x" * 400)
    images, result = _StaticImages(1000), SimpleNamespace(shards=shards)
    assert [gene for gene, _ in images.draw(result, section(), [4, 0, 2, 1])] == ["G4", "G0", "G2"]
    assert images.draw(result, section(), [1]) == []


def test_the_json_cannot_end_its_script():
    text = str(page_json([SectionPayload("", {"id": "</script><script>alert(1)</script>&", "x": float("nan")}, 1)]))
    assert "<" not in text
    assert "&" not in text
    section_data = json.loads(text)["sections"][0]
    assert section_data == {"id": "</script><script>alert(1)</script>&", "x": None}


def test_undefined_scores_are_null_and_positions_fit():
    data = section()
    data.gene_table.loc[0, "pcc"] = np.nan
    data.gene_table.loc[1, "seen"] = "held out"
    genes, seen = payload._genes(data)
    assert [seen[gene[5]] for gene in genes] == data.gene_table["seen"].tolist()
    assert genes[0][:2] == ["G0", None]
    assert genes[1][1] == pytest.approx(data.pcc[1], abs=1e-4)
    assert base64.b64decode(payload._base64(b"ab")) == b"ab"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.6, 1), (0, 1e-3), (-3, 5000), (0.4, 0.41)])
def test_ticks_are_round_and_inside(low: float, high: float):
    found = ticks(low, high)
    assert 2 <= len(found) <= 12
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    assert len({f"{t:g}" for t in found}) == len(found)


def test_maps_name_what_an_anndata_lacks():
    data = ad.AnnData(
        np.ones((3, 1), np.float32), layers={LAYER_CP10K: np.ones((3, 1)), LAYER_MEASURED_CP10K: np.ones((3, 1))}
    )
    genes = data.var_names.tolist()
    with pytest.raises(ValueError, match="`genes`: the list is empty"):
        maps(data, [])
    with pytest.raises(ValueError, match="has no positions"):
        maps(data, genes)
    data.obsm["spatial"] = np.ones((3, 2))
    for spatial, lacking in (
        ({}, "no hires image"),
        ({"s": {"images": {"lowres": np.zeros((2, 2, 3))}, "scalefactors": {}}}, "no hires image"),
        ({"s": {"images": {"hires": np.zeros((2, 2, 3))}}}, "no scale factor tissue_hires_scalef"),
    ):
        data.uns["spatial"] = spatial
        with pytest.raises(ValueError, match=lacking):
            maps(data, genes)


def test_curves_of_a_run_that_was_killed_while_it_wrote_a_row(tmp_path: Path):
    rows = [{"step": step, "kind": "train", "nce": 3.0 - step / 10} for step in range(1, 4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "kind": "tr', encoding="utf-8")
    curves = loss_curves(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert curves
    assert curves == loss_curves(tmp_path / "metrics.jsonl")
