"""Predictions use the readout's head of the section's cohort, as an evaluation does; two tissues, and a new tissue after adaptation."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardSet
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import open_source

import comtip_fast
from comtip_fast.api import Model
from comtip_fast.evaluation.evaluate import evaluate
from comtip_fast.inference import Predictor
from comtip_fast.models.readout.heads import CohortHead, Readout
from comtip_fast.slide_prediction import run as slides
from testkit.tiny import TinySection, write_tiny_source

GENES = ["ERBB2", "CD74"]
SLIDE = {"mpp": 5.0, "species": "human"}


def other(head: CohortHead, cohort: str) -> CohortHead:
    """Return a head of another cohort that predicts the reversed patterns."""
    blocks = {
        block: {
            norm: replace(part, loading_KG=-part.loading_KG, mean_G=part.mean_G + 1) for norm, part in norms.items()
        }
        for block, norms in head.blocks.items()
    }
    return replace(head, cohort=cohort, blocks=blocks)


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Model:
    """A model of two human tissues."""
    bundle = Predictor.load(tiny_run).bundle
    readout = bundle.readout
    assert readout is not None
    heads = [*readout.heads, other(readout.heads[0], "human_lung")]
    return Model(Predictor(replace(bundle, readout=Readout(readout.settings, heads))))


def only(model: Model, cohort: str) -> Model:
    """Return the model with the head of one cohort alone."""
    readout = model.predictor.bundle.readout
    assert readout is not None
    alone = Readout(readout.settings, [h for h in readout.heads if h.cohort == cohort])
    return Model(Predictor(replace(model.predictor.bundle, readout=alone)))


def distance(a: Any, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a) - b).max())


def test_a_prediction_is_what_an_evaluation_scores(model: Model, tiny_shards: ShardSet):
    predicted = model.predict(f"{tiny_shards.path}:x1")
    scored = evaluate(model.predictor, tiny_shards, sections=["x1"], n_null=0).sections[0]
    order = tiny_shards.source_order(tiny_shards.section_number("x1"))
    row = {int(spot): i for i, spot in enumerate(order)}
    both = [k for k in scored.keys if k in set(predicted.var["key"])]
    column = {k: i for i, k in enumerate(predicted.var["key"])}
    found = predicted.X[[row[int(s)] for s in scored.spots]][:, [column[k] for k in both]]
    want = scored.predicted["cp10k"][:, [scored.keys.index(k) for k in both]]
    np.testing.assert_allclose(found, want, atol=1e-4)
    joined = model.compare(f"{tiny_shards.path}:x1")
    assert joined.uns["comtip"]["readout"] == "human_breast"
    pcc = dict(zip(scored.gene_table["key"], scored.gene_table["pcc"], strict=True))
    np.testing.assert_allclose(joined.var["pcc"], [pcc[k] for k in joined.var["key"]], atol=1e-4)


def test_the_tissue_of_every_kind_of_section_selects_the_head(
    model: Model, tiny_source: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING, "comtip_fast")
    source = f"{tiny_source}:x1"
    breast, lung = (only(model, c).predict(source, GENES).X for c in ("human_breast", "human_lung"))
    mean = (breast + lung) / 2
    assert min(distance(breast, lung), distance(breast, mean)) > 0.1
    # A source that states its tissue, one whose stated tissue takes precedence, and a tissue without a head.
    assert distance(model.predict(source, GENES).X, breast) < 1e-3
    assert distance(model.predict(source, GENES, facts={"tissue": "lung, left"}).X, lung) < 1e-3
    assert not caplog.messages
    unknown = model.predict(source, GENES, facts={"tissue": "brain"})
    assert distance(unknown.X, mean) < 1e-3
    assert unknown.uns["comtip"]["readout"] == "human_breast; human_lung"
    assert (
        "no readout for human_brain, so the prediction is the mean over those for human_breast, human_lung"
        in caplog.text
    )
    # An AnnData that states its tissue in obs, or not at all.
    predicted = model.predict(source, GENES)
    data = ad.AnnData(obs=pd.DataFrame(index=predicted.obs_names), obsm={"spatial": predicted.obsm["spatial"]})
    facts = SLIDE | {"image": str(tiny_source / "x1.png")}
    caplog.clear()
    assert distance(model.predict(data, GENES, facts=facts).X, mean) < 1e-3
    assert "the tissue is not stated" in caplog.text
    data.obs["tissue"] = "Lung"
    assert distance(model.predict(data, GENES, facts=facts).X, lung) < 1e-3


def test_tiles_and_slides_use_the_stated_tissue(model: Model, tiny_source: Path, tmp_path: Path):
    tiles = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    options: dict[str, Any] = {"mpp": 3.5, "genes": GENES, "species": "human"}
    found = [model.predict_tiles(tiles, tissue=t, **options) for t in (None, "breast", "lung")]
    np.testing.assert_allclose(found[0].X, (found[1].X + found[2].X) / 2, atol=1e-4)
    assert distance(found[1].X, found[2].X) > 0.1
    assert [f.uns["comtip"]["readout"] for f in found] == ["human_breast; human_lung", "human_breast", "human_lung"]

    out = tmp_path / "x.h5ad"
    slide = tiny_source / "x1.png"
    values = []
    for tissue in (None, "breast", "lung"):
        facts = SLIDE | ({} if tissue is None else {"tissue": tissue})
        values.append(np.asarray(model.predict_slide(slide, GENES, out=out, facts=facts).X[:]))
    np.testing.assert_allclose(values[0], (values[1] + values[2]) / 2, atol=1e-4)
    assert distance(values[1], values[2]) > 0.1


def test_pieces_of_a_slide_depend_on_the_head(model: Model, tiny_source: Path):
    """Also where all that is recorded of the request is the same."""
    request = model._slide_request(tiny_source / "x1.png", GENES, SLIDE, comtip_fast.GridOptions(), False)
    with slides.open_slide(tiny_source / "x1.png") as opened:
        plans = [
            slides._plan(model.predictor, tiny_source / "x1.png", opened, replace(request, cohort=cohort))
            for cohort in (None, "human_lung")
        ]
    assert plans[0] != plans[1]


def test_after_adaptation_to_a_new_tissue_its_own_head_predicts(tiny_run: Path, tmp_path: Path):
    sections = [TinySection("n1", "donor_new", "test")]
    source = write_tiny_source(tmp_path / "source", sections, side=14, seed=7, pitch_px=20).parent
    table = pd.read_csv(source / "manifest.tsv", sep="\t").assign(tissue="lung")
    table.to_csv(source / "manifest.tsv", sep="\t", index=False)
    build_shards(open_source(source), tmp_path / "set", tile_px=32, tile_um=224.0, min_mpp=5.0)
    spec = f"{tmp_path / 'set'}:n1"
    adapted = comtip_fast.adapt(tiny_run, spec, tmp_path / "adapted", fraction=0.2, splits=1, device="cpu")
    readout = adapted.predictor.bundle.readout
    assert readout is not None
    assert [h.cohort for h in readout.heads] == ["human_breast", "human_lung"]
    model = comtip_fast.load(tmp_path / "adapted", "cpu")
    found = model.predict(spec, GENES)
    assert found.uns["comtip"]["readout"] == "human_lung"
    np.testing.assert_allclose(found.X, only(model, "human_lung").predict(spec, GENES).X, atol=1e-5)
