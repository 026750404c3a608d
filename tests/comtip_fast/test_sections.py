"""Sections for predict and embed: each option is honoured or refused, as in a build."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardSet, SourceError
from comtip_shards.sections.facts import source_options
from comtip_shards.sources import open_source
from PIL import Image

from comtip_fast.data.anndata_file import rows_copy
from comtip_fast.data.measured import measured_counts
from comtip_fast.data.sections import TileGeometry, open_section
from comtip_fast.inference.answers import species_of

IDS = ["ENSG00000141736", "ENSG00000019582", "ENSG00000119888"]
N = 60
ROW, COL = np.divmod(np.arange(N), 10)
COL = COL * 2 + ROW % 2
XY = np.column_stack([60 + COL * 25.0, 60 + ROW * 43.3])
TILE = TileGeometry(16, 64.0, 4.0)


def test_what_a_section_needs_is_named(tiny_shards: ShardSet, tmp_path: Path):
    with pytest.raises(
        SourceError, match="is a shard set, and no section is named; give SHARDS:section_id with one of t1"
    ):
        open_section(tiny_shards.path, TileGeometry(32, 224.0, 5.0))
    with pytest.raises(SourceError, match=r"tiles of 224\.0 um .* reads 224\.0000001 um"):
        open_section(f"{tiny_shards.path}:x1", TileGeometry(32, 224.0000001, 5.0))
    data = adata()
    data.write_h5ad(tmp_path / "one.h5ad")
    with pytest.raises(SourceError, match="no section 'zz'; its sections: one; choose this one, or name no section"):
        open_section(f"{tmp_path / 'one.h5ad'}:zz", TILE)
    data.obs["library_id"] = ["lib"] * 30 + ["other"] * 30
    data.uns["spatial"]["other"] = data.uns["spatial"]["lib"]
    data.write_h5ad(tmp_path / "two.h5ad")
    with pytest.raises(SourceError, match=r"no section 'zz'; its sections: lib, other; choose one$"):
        open_section(f"{tmp_path / 'two.h5ad'}:zz", TILE)


def picture(blue: int = 170, scale: int = 1) -> np.ndarray:
    y, x = np.mgrid[0 : 400 * scale, 0 : 640 * scale] / scale
    return np.stack([x / 4, y / 2, np.full(x.shape, blue)], axis=-1).astype(np.uint8)


def adata(ids: list[str] = IDS) -> ad.AnnData:
    obs = pd.DataFrame({"in_tissue": 1, "array_row": ROW, "array_col": COL}, index=[f"s{i}" for i in range(N)])
    a = ad.AnnData(np.ones((N, len(ids)), np.float32), obs, pd.DataFrame(index=ids))
    a.obsm["spatial"] = XY.copy()
    factors = {"tissue_hires_scalef": 1.0, "spot_diameter_fullres": 32.5}
    a.uns["spatial"] = {"lib": {"images": {"hires": picture()}, "scalefactors": factors}}
    return a


@pytest.fixture(params=["file", "memory"])
def spec(request: pytest.FixtureRequest, tmp_path: Path):
    """Write an AnnData to a file, or keep it in memory."""

    def give(data: ad.AnnData):
        if request.param == "memory":
            return data
        data.write_h5ad(tmp_path / "a.h5ad")
        return tmp_path / "a.h5ad"

    return give


def test_an_anndata_is_read_with_its_facts(spec):
    opened = open_section(spec(adata()), TILE, {"mpp": "2.0"})
    assert opened.species == "human"
    assert opened.tiles.all().shape == (N, 16, 16, 3)
    np.testing.assert_allclose(opened.tiles.all()[0].mean((0, 1))[:2], [XY[0, 0] / 4, XY[0, 1] / 2], atol=1)
    visium = open_section(spec(adata()), TILE, {"platform": "Visium"})
    assert np.abs(visium.tiles.all().astype(int) - opened.tiles.all()).mean() < 1


def test_a_stated_image_is_used(spec, tmp_path: Path):
    Image.fromarray(picture(blue=40)).save(tmp_path / "full.png")
    opened = open_section(spec(adata()), TILE, {"mpp": "2.0", "image": str(tmp_path / "full.png")})
    assert np.median(opened.tiles.all()[..., 2]) == 40
    with pytest.raises(SourceError, match=r"nowhere\.png: no such file; copy the image \(`image`\) there"):
        open_section(spec(adata()), TILE, {"mpp": "2.0", "image": str(tmp_path / "nowhere.png")})


def test_positions_belong_to_the_stated_image(spec, tmp_path: Path):
    a = adata()
    a.obsm["spatial"] = XY * 2  # of an image of twice the size
    a.uns["spatial"]["lib"]["scalefactors"] = {"tissue_hires_scalef": 0.5}
    Image.fromarray(picture(scale=2)).save(tmp_path / "full.png")
    one = open_section(spec(a), TILE, {"mpp": "1.0"})
    two = open_section(spec(a), TILE, {"mpp": "1.0", "image": str(tmp_path / "full.png")})
    assert np.abs(one.tiles.all().astype(int) - two.tiles.all()).mean() < 1.5


@pytest.mark.parametrize("option", ["pool_um", "qv", "alignment", "min_cover", "pixels", "layer", "round_counts"])
def test_options_without_effect_are_refused(spec, option: str):
    with pytest.raises(SourceError, match=f"`{option}` has no effect here.*leave it out"):
        open_section(spec(adata()), TILE, {"mpp": "2.0", option: "wsi" if option == "pixels" else "1"})


@pytest.mark.parametrize("key", ["specie", "species_", "colour"])
def test_unknown_facts_are_refused(spec, tiny_shards: ShardSet, key: str):
    for section in (spec(adata()), f"{tiny_shards.path}:x1"):
        with pytest.raises(SourceError, match=f"unknown fact '{key}'"):
            open_section(section, TILE, {"mpp": "2.0", key: "mouse"})


@pytest.mark.parametrize("key", ["mpp", "species", "image", "platform", "qv"])
def test_a_shard_set_takes_no_facts(tiny_shards: ShardSet, key: str):
    tile = TileGeometry(tiny_shards.manifest.tile.px, tiny_shards.manifest.tile.um, tiny_shards.manifest.tile.min_mpp)
    assert open_section(f"{tiny_shards.path}:x1", tile).species == "human"
    with pytest.raises(SourceError, match=f"`{key}` has no effect here: a shard set states"):
        open_section(f"{tiny_shards.path}:x1", tile, {key: "human" if key == "species" else "1"})


def test_the_species_is_detected_or_stated(spec):
    mouse = [i.replace("ENSG", "ENSMUSG") for i in IDS]
    assert open_section(spec(adata(mouse)), TILE, {"mpp": "2.0"}).species == "mouse"
    assert (
        open_section(spec(adata(["ERBB2", "CD74", "VIM"])), TILE, {"mpp": "2.0", "species": "human"}).species == "human"
    )
    with pytest.raises(SourceError, match=r"stated as human, but gene ids such as ENSMUSG.*`species` to mouse"):
        open_section(spec(adata(mouse)), TILE, {"mpp": "2.0", "species": "human"})
    assert open_section(spec(adata(["ERBB2", "CD74", "VIM"])), TILE, {"mpp": "2.0"}).species == ""


def test_an_unknown_species_is_never_guessed_between_two():
    one: Any = SimpleNamespace(trained_genes=["human:ERBB2"])
    assert species_of(one, "", "s") == "human"
    two: Any = SimpleNamespace(trained_genes=["human:ERBB2", "mouse:Erbb2"])
    with pytest.raises(SourceError, match="trained on human and mouse; set `species`"):
        species_of(two, "", "s")


@pytest.mark.parametrize("mpp", ["20", "0.2"])
def test_a_tenfold_wrong_scale_is_refused(spec, mpp: str):
    with pytest.raises(
        SourceError, match=r"the spot pitch is .* um, but on a Visium slide it is 100 um; set `mpp` to 2"
    ):
        open_section(spec(adata()), TILE, {"mpp": mpp})


@pytest.mark.parametrize("mpp", ["0", "-1", "nan"])
def test_a_scale_that_is_none_is_refused(spec, mpp: str):
    with pytest.raises(SourceError, match=f"`mpp` {mpp}: must be (greater than 0|a finite number)"):
        open_section(spec(adata()), TILE, {"mpp": mpp})


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan")])
def test_a_scale_in_the_file_that_is_none_is_refused(spec, mpp: float):
    a = adata()
    a.uns["spatial"]["lib"]["scalefactors"]["microns_per_pixel"] = mpp
    with pytest.raises(SourceError, match="expected a positive number; set `mpp`"):
        open_section(spec(a), TILE)


def test_spots_without_a_position_are_refused(spec):
    a = adata()
    a.obsm["spatial"][3] = np.nan
    with pytest.raises(SourceError, match="1 of 60 spots have no position"):
        open_section(spec(a), TILE, {"mpp": "2.0"})


def test_positions_in_a_table_are_read_by_name(spec):
    a = adata()
    a.obsm["spatial"] = pd.DataFrame(XY[:, ::-1], index=a.obs_names, columns=["y", "x"])
    opened = open_section(spec(a), TILE, {"mpp": "2.0"})
    np.testing.assert_allclose(opened.template.obsm["spatial"], XY)


def test_cellxgene_has_one_library(spec):
    a = adata()
    a.uns["spatial"]["is_single"] = True
    assert open_section(spec(a), TILE, {"mpp": "2.0"}).section_id == "lib"
    a.uns["spatial"]["second"] = a.uns["spatial"]["lib"]
    a.obs["library_id"] = ["lib", "second"] * (N // 2)
    with pytest.raises(
        SourceError, match=r"2 sections \((lib, second|second, lib)\); (name one of them, e.g.|keep the)"
    ):
        open_section(spec(a), TILE, {"mpp": "2.0"})


def two_sections() -> ad.AnnData:
    """Return two sections in one AnnData, whose spots are at the same positions and whose pictures differ in blue."""
    a, b = adata(), adata()
    both = ad.concat({"A": a, "B": b}, label="library_id", index_unique="-")
    both.uns["spatial"] = {"A": a.uns["spatial"]["lib"], "B": b.uns["spatial"]["lib"], "is_single": False}
    both.uns["spatial"]["B"]["images"]["hires"] = picture(blue=90)
    both.X[:, 0] = 2 + np.arange(2 * N)
    return both


def test_one_section_of_several_is_read_by_its_name(tmp_path: Path):
    path, options = tmp_path / "both.h5ad", source_options({"mpp": "2.0"})
    two_sections().write_h5ad(path)
    for number, name in enumerate("AB"):
        opened = open_section(f"{path}:{name}", TILE, options)
        assert opened.section_id == name
        assert opened.template.obs_names.tolist() == [f"s{i}-{name}" for i in range(N)]
        assert [k for k in opened.template.uns["spatial"] if k != "is_single"] == [name]
        assert opened.tiles.all()[..., 2].mean() == pytest.approx([170, 90][number], abs=2)
        counts = measured_counts(f"{path}:{name}", "human", options)
        np.testing.assert_array_equal(counts.counts[:, 0].toarray().ravel(), 2 + number * N + np.arange(N))
        copied = rows_copy(f"{path}:{name}", opened.rows, opened.template.uns["spatial"])
        np.testing.assert_array_equal(copied.X[:, 0], 2 + number * N + np.arange(N))
    with pytest.raises(SourceError, match="no section 'C'; its sections: A, B"):
        open_section(f"{path}:C", TILE, options)


@pytest.mark.parametrize("name", ["one", "lib"])
def test_the_only_section_has_the_name_of_the_file_and_of_its_library(tmp_path: Path, name: str):
    adata().write_h5ad(tmp_path / "one.h5ad")
    assert open_section(f"{tmp_path / 'one.h5ad'}:{name}", TILE, {"mpp": "2.0"}).section_id == "lib"


@pytest.mark.parametrize("kind", ["folder", "zarr"])
def test_the_counts_of_a_section_of_a_source_are_read(tmp_path: Path, kind: str):
    folder = tmp_path / ("data" if kind == "folder" else "S1.zarr")
    if kind == "folder":
        folder.mkdir()
        adata().write_h5ad(folder / "S1.h5ad")
    else:
        adata().write_zarr(folder)
    counts = measured_counts(f"{folder}:S1", "human", source_options({"mpp": "2.0"}), "anndata")
    assert counts.counts.shape == (N, len(IDS))
    assert counts.counts.sum() == N * len(IDS)
    with pytest.raises(SourceError):
        measured_counts(f"{folder}:S1", "human", source_options({"mpp": "2.0"}), "hest")


def test_normalised_counts_and_no_tissue_do_not_matter(tmp_path: Path):
    a = adata()
    a.X = np.log1p(a.X) + 0.123
    a.write_zarr(tmp_path / "a.zarr")
    opened = open_section(tmp_path / "a.zarr", TILE, {"mpp": "2.0"})
    assert opened.tiles.all().shape == (N, 16, 16, 3)
    with pytest.raises(SourceError, match="raw counts are needed"):
        open_source(tmp_path / "a.zarr", overrides={"mpp": "2.0", "tissue": "x"})[0].read()


def test_files_that_are_no_data_are_named(tmp_path: Path):
    (tmp_path / "a.h5ad").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(SourceError, match="Git LFS pointer"):
        open_section(tmp_path / "a.h5ad", TILE, {"mpp": "2.0"})


@pytest.mark.parametrize("name", ["a.H5AD", "a.h5", "a.h5ad (1)"])
def test_an_anndata_of_another_name_is_opened_as_an_anndata(tmp_path: Path, name: str):
    data = adata()
    data.X[0, 0] = 0.5  # counts are not read, so predict and embed need none
    data.write_h5ad(tmp_path / "written.h5ad")
    opened = open_section((tmp_path / "written.h5ad").rename(tmp_path / name), TILE, {"mpp": "2.0"})
    assert len(opened.rows) == N  # of the AnnData, which embed copies
