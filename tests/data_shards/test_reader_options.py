"""Options of the readers: each is honoured or refused, for every format."""

import json
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardError, ShardSet, SourceError
from comtip_shards.builder.build import build_shards
from comtip_shards.sections.facts import FACT_KEYS, META_KEYS, OPTION_KEYS, POOL_KEYS
from comtip_shards.sources import READERS, open_source
from PIL import Image

from testkit.option_reads import declared, fields_read

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "data_shards/samples"
VALID = {"pixels": "wsi", "pool_from": "cells", "round_counts": "yes"}
"""A valid value of each option that does not take ``1``."""
VISIUM = Path(__file__).parent / "fixtures/space_ranger/visium_sr1_h5"


def legacy(folder: Path, n: int = 1) -> Path:
    folder.mkdir()
    for i in range(n):
        spots = [f"{x}x{y}" for x in range(2, 6) for y in range(2, 6)]
        table = pd.DataFrame(np.ones((16, 2), int), index=spots, columns=["ERBB2", "CD74"])
        table.to_csv(folder / f"S{i}.tsv.gz", sep="\t")
        Image.new("RGB", (640, 680), (200, 120, 160)).save(folder / f"S{i}_HE.jpg")
    return folder


@pytest.mark.parametrize("key", ["specie", "Species", "mpp_um", "img"])
def test_unknown_facts_are_refused_with_the_nearest_name(key: str):
    with pytest.raises(SourceError, match=f"unknown fact '{key}'; .*tissue"):
        open_source(SAMPLES, overrides={key: "human"})


def test_a_near_name_is_proposed():
    with pytest.raises(SourceError, match=r"unknown fact 'specie'; did you mean species\?"):
        open_source(SAMPLES, overrides={"specie": "mouse"})


@pytest.mark.parametrize("key", [*OPTION_KEYS, *POOL_KEYS])
def test_a_manifest_uses_no_options(key: str):
    with pytest.raises(SourceError, match=f"`{key}` has no effect here"):
        open_source(SAMPLES, overrides={key: VALID.get(key, "1")})


@pytest.mark.parametrize("key", [k for k in (*OPTION_KEYS, *POOL_KEYS) if k != "image"])
def test_space_ranger_uses_only_the_image(key: str):
    with pytest.raises(SourceError, match=f"`{key}` has no effect here"):
        open_source(VISIUM, overrides={"tissue": "heart", "image": "lowres", key: VALID.get(key, "1")})


def test_every_option_is_used_by_a_reader():
    used = {o for r in READERS for o in r.options}
    assert used == set(META_KEYS) - set(FACT_KEYS)


def test_an_empty_value_states_nothing():
    assert open_source(SAMPLES, samples=["mob2k_1"], overrides={"image": "", "qv": ""})[0].meta.species == "mouse"


def test_one_image_for_several_legacy_sections_is_refused(tmp_path: Path):
    facts = {"species": "human", "tissue": "breast"}
    path = legacy(tmp_path / "d", 2)
    with pytest.raises(SourceError, match=r"`image` is one file but there are 2 sections; use \{id\}"):
        open_source(path, overrides=facts | {"image": str(path / "S0_HE.jpg")})
    for i in range(2):
        shutil.copy(path / f"S{i}_HE.jpg", tmp_path / f"other_S{i}.jpg")
    sources = open_source(path, overrides=facts | {"image": str(tmp_path / "other_{id}.jpg")})
    assert [s.inputs[0].name for s in sources] == ["other_S0.jpg", "other_S1.jpg"]
    with pytest.raises(SourceError, match=r"nowhere\.jpg: no such file"):
        open_source(path, samples=["S0"], overrides=facts | {"image": str(tmp_path / "nowhere.jpg")})


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_tenfold_wrong_scale_of_a_legacy_array_is_refused(tmp_path: Path, factor: float):
    facts = {"species": "human", "tissue": "breast"}
    path = legacy(tmp_path / "d")
    mpp = open_source(path, overrides=facts)[0].meta.mpp
    assert open_source(path, overrides=facts | {"mpp": str(mpp)})[0].meta.mpp == mpp
    with pytest.raises(SourceError, match=r"the spot pitch is \d+ um, but arrays have 150 or 200 um; set `mpp` to 10"):
        open_source(path, overrides=facts | {"mpp": str(mpp * factor)})


@pytest.mark.parametrize("species", ["human", "Homo sapiens", "homo_sapiens", "NCBITaxon:9606"])
def test_species_by_any_usual_name(tmp_path: Path, species: str):
    path = legacy(tmp_path / "d")
    assert open_source(path, overrides={"species": species, "tissue": "x"})[0].meta.species == "human"


def test_scale_factors_of_visium_hd_are_not_needed_for_the_message(tmp_path: Path):
    """A missing file is reported as missing, not as invalid JSON."""
    run = Path(shutil.copytree(VISIUM, tmp_path / "v", copy_function=shutil.copyfile))
    factors = next(run.rglob("*scalefactors_json.json"))
    scale = json.loads(factors.read_text())
    factors.unlink()
    with pytest.raises(SourceError, match=r"scalefactors_json\.json is missing or empty"):
        open_source(run, overrides={"tissue": "heart", "image": "lowres"})
    factors.write_text(json.dumps({k: v for k, v in scale.items() if "lowres" not in k}))
    with pytest.raises(
        SourceError, match=r"tissue_lowres_scalef in scalefactors_json\.json is missing or not a positive number"
    ):
        open_source(run, overrides={"tissue": "heart", "image": "lowres"})


def test_another_layer_is_another_set(tmp_path: Path):
    """The layer shows in neither the metadata nor the input files, so the fingerprint holds it."""
    spots = pd.DataFrame({"in_tissue": 1}, index=[f"s{i}" for i in range(16)])
    genes = pd.DataFrame(index=["ENSG00000141736", "ENSG00000019582"])
    data = ad.AnnData(np.full((16, 2), 3, np.float32), spots, genes, layers={"double": np.full((16, 2), 6, np.float32)})
    data.obsm["spatial"] = np.stack(np.meshgrid(np.arange(4), np.arange(4)), axis=-1).reshape(-1, 2) * 100.0 + 50
    Image.effect_noise((400, 400), 80).convert("RGB").save(tmp_path / "image.png")
    data.write_h5ad(tmp_path / "a.h5ad")
    facts = {"tissue": "breast", "mpp": "1.0", "platform": "other", "image": str(tmp_path / "image.png")}

    def build(layer: str, out: str) -> ShardSet:
        sources = open_source(tmp_path / "a.h5ad", overrides=facts | {"layer": layer})
        build_shards(sources, tmp_path / out, tile_px=16, tile_um=50.0, min_mpp=4.0)
        return ShardSet(tmp_path / out)

    first = build("X", "set")
    assert first.counts(range(16)).sum() == 96
    with pytest.raises(ShardError, match="holds another shard set"):
        build("double", "set")
    assert build("double", "other").counts(range(16)).sum() == 192
    assert build("X", "set").manifest.fingerprint == first.manifest.fingerprint


def test_every_declared_option_is_read(tmp_path: Path):
    path = legacy(tmp_path / "d")
    assert fields_read(path, species="human", tissue="breast") == declared(path)
    assert fields_read(VISIUM, tissue="heart", image="lowres") == declared(VISIUM)
    assert fields_read(SAMPLES) == declared(SAMPLES)
