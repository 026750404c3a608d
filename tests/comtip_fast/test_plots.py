"""Figures and tables of :mod:`comtip_fast.plots` show the numbers of the report."""

from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_hex
from sklearn.metrics import adjusted_rand_score

from comtip_fast import plots
from comtip_fast.constants import LAYER_CP10K, LAYER_MEASURED_CP10K
from comtip_fast.drawing import GROUPS
from comtip_fast.evaluation.report.page import _ranked
from comtip_fast.evaluation.report.summaries import clusters, intervals
from comtip_fast.metrics import pcc_per_gene
from tests.comtip_fast.test_report_parts import section

PER_PX = 0.5


def joined(genes: int = 5, noise: float = 0.5) -> ad.AnnData:
    """The section of the report's tests, as ``Model.compare`` returns it."""
    data = section(genes=genes, noise=noise)
    measured, predicted = data.measured["cp10k"], data.predicted["cp10k"]
    var = pd.DataFrame({"pcc_partial": np.arange(genes) / 10, "validation_pcc": np.nan}, index=data.gene_table["gene"])
    factors = {"tissue_hires_scalef": PER_PX, "spot_diameter_fullres": 8.0, "microns_per_pixel": 1.0}
    return ad.AnnData(
        predicted.astype(np.float32),
        obs=pd.DataFrame({"region": ["a", ""] * 72}, index=[f"s{i}" for i in range(144)]),
        var=var,
        obsm={"spatial": data.xy + 20},
        layers={LAYER_CP10K: predicted, LAYER_MEASURED_CP10K: measured},
        uns={"spatial": {"s": {"images": {"hires": np.zeros((90, 90, 3), np.uint8)}, "scalefactors": factors}}},
    )


def drawn(axis) -> dict[str, np.ndarray]:
    """Return the positions of the spots that an axis shows, by colour."""
    marks = [c for c in axis.collections if isinstance(c, EllipseCollection)]
    return {to_hex(m.get_facecolor()[0]): np.asarray(m.get_offsets()) for m in marks}


def test_clusters_are_drawn_next_to_labels_with_the_agreement_of_the_report():
    adata, data = joined(noise=0.1), section(noise=0.1)
    for values, strength in ((data.measured["cp10k"], 4.0), (data.predicted["cp10k"], 0.6)):
        values += strength * (data.xy[:, :1] > 55)
    adata.layers[LAYER_MEASURED_CP10K], adata.layers[LAYER_CP10K] = data.measured["cp10k"], data.predicted["cp10k"]
    labels = np.where(adata.obsm["spatial"][:, 0] > 75, "tumour", "stroma").astype(object)
    labels[:5] = "unknown"
    figure = plots.clusters(adata, labels.tolist())
    spots = pd.DataFrame({"label": labels, "spot_id": adata.obs_names})
    table, agreement = clusters(SimpleNamespace(shards=SimpleNamespace(spots=spots)), data)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    for title, name in zip(titles[1:], ("measured", "predicted"), strict=True):
        assert title == f"clusters of {name}, ARI {agreement[name]['ari']:.2f}"
        direct = adjusted_rand_score(table["label"], table[name])
        assert f"{direct:.2f}" in title
    assert titles[1] != titles[2].replace("predicted", "measured"), "the case must tell the two apart"
    xy = adata.obsm["spatial"] * PER_PX
    for axis, code in zip(
        figure.axes, (table["label"] == "tumour", table["measured"] == 2, table["predicted"] == 2), strict=True
    ):
        for value, colour in ((False, GROUPS[0]), (True, GROUPS[1])):
            np.testing.assert_allclose(drawn(axis)[colour], xy[table["row"][code.to_numpy() == value]])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["stroma", "tumour"]


def test_labels_may_be_a_column_and_bad_ones_are_refused():
    adata = joined()
    adata.obs["region"] = pd.Categorical(["a", "b", ""] * 48)
    assert sum(map(len, drawn(plots.clusters(adata, "region").axes[0]).values())) == 96
    with pytest.raises(ValueError, match=r"`labels` 'layer': no such column of adata.obs; choose one of region"):
        plots.clusters(adata, "layer")
    with pytest.raises(ValueError, match="`labels`: 3 labels for 144 spots"):
        plots.clusters(adata, ["a", "b", "c"])
    with pytest.raises(
        ValueError, match="`labels`: 144 spots have one of 1 labels; give at least 30 spots with 2 to 20"
    ):
        plots.clusters(adata, ["a"] * 144)
    adata.obs["region"] = ["a", "b", *[""] * 142]
    with pytest.raises(ValueError, match="2 spots have one of 2 labels"):
        plots.clusters(adata, "region")


def test_scores_of_an_evaluation_or_its_table_have_the_intervals_of_the_report():
    data = section()
    table = intervals(data)
    for figure in (plots.scores(table), plots.scores(SimpleNamespace(sections=[data]))):  # type: ignore[arg-type]
        (axis,) = figure.axes
        assert axis.get_title(loc="left") == "s"
        assert [t.get_text() for t in axis.get_yticklabels()] == ["CoMTIP, zero-shot", "ridge, mean colour"]
        whiskers = [line.get_xdata() for line in axis.lines if len(line.get_xdata()) == 2 and line.get_lw() == 2]
        np.testing.assert_allclose(whiskers, table[["low", "high"]])
        points = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]
        np.testing.assert_allclose(points, table["mean_pcc"])
    other = table.assign(section="t", low=np.nan, high=np.nan)
    first, second = plots.scores(pd.concat([table, other])).axes
    assert (len(first.lines), len(second.lines)) == (5, 3), "a score without an interval has no whisker"
    unseen = table.assign(predictor=["zero_shot_unseen_genes", "unseen_ridge"], mean_pcc=[0.1, 0.2])
    first, second = plots.scores(pd.concat([table, unseen])).axes
    assert first.get_xlabel() == "mean PCC, 50 most variable genes"
    assert second.get_xlabel() == "mean PCC, unseen genes (up to 50)"
    assert [t.get_text() for t in first.get_yticklabels()] == ["CoMTIP, zero-shot", "ridge, mean colour"]
    assert [t.get_text() for t in second.get_yticklabels()] == ["CoMTIP, zero-shot", "ridge, trained on them"]
    assert [line.get_xdata()[0] for line in second.lines if line.get_marker() == "o"] == [0.1, 0.2]
    with pytest.raises(ValueError, match=r"has no column 'section'; pass intervals.csv"):
        plots.scores(pd.DataFrame({"cohort": ["c"], "predictor": ["zero_shot"]}))
    with pytest.raises(ValueError, match="has no rows"):
        plots.scores(table.iloc[:0])


def test_best_median_and_worst_genes_are_those_of_the_report():
    adata = joined(genes=30, noise=3.0)
    adata.layers[LAYER_CP10K][:, 4] = 1.0  # constant: undefined, and ranked as 0
    pcc = pcc_per_gene(adata.layers[LAYER_MEASURED_CP10K], adata.layers[LAYER_CP10K])
    table = plots.ranked_genes(adata)
    assert table["rank"].tolist() == ["Best"] * 8 + ["Median"] * 8 + ["Worst"] * 8
    order = np.sort(np.nan_to_num(pcc))[::-1]
    np.testing.assert_allclose(np.nan_to_num(table["pcc"]), np.concatenate([order[:8], order[11:19], order[-8:]]))
    np.testing.assert_allclose(table["pcc_partial"], adata.var.loc[table.index, "pcc_partial"])
    data = section(genes=30, noise=3.0)
    data.pcc = pcc
    report = [(title, [row["gene"] for row in rows]) for title, rows in _ranked(data)]
    assert report == [(rank, own.index.tolist()) for rank, own in table.groupby("rank", sort=False)]
    few = plots.ranked_genes(adata, n=10)
    assert (few["rank"] == "All genes").all()
    assert len(few) == 30
    with pytest.raises(ValueError, match="n is 0; give a number of genes of at least 1"):
        plots.ranked_genes(adata, n=0)
