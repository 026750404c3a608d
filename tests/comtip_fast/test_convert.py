"""Sections, predictions and embeddings as SpatialData and as Space Ranger files, read back by the libraries of the field."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardSet, SourceError
from comtip_shards.sources import open_source
from comtip_shards.sources.tenx.matrix import TenxMatrix
from PIL import Image
from scipy import sparse

from comtip_fast.cli import main
from comtip_fast.constants import OBSM_EMBEDDING
from comtip_fast.data.convert import MICRONS, read_section, to_spatialdata, write_space_ranger
from comtip_fast.data.space_ranger_files import MATRIX, array_notes, positions_table

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def section(tiny_shards: ShardSet) -> ad.AnnData:
    return read_section(f"{tiny_shards.path}:x1")


@pytest.fixture(scope="module")
def prediction(section: ad.AnnData) -> ad.AnnData:
    """An AnnData as predict and embed write it: fractional values, a layer, vectors and provenance."""
    rng = np.random.default_rng(0)
    data = section.copy()
    data.X = rng.uniform(0.1, 4, section.shape).astype(np.float32)
    data.layers["log1p_raw"] = np.log1p(data.X)
    data.obsm[OBSM_EMBEDDING] = rng.normal(size=(section.n_obs, 8)).astype(np.float32)
    data.uns["comtip"] = {"version": "0", "model": "m"}
    return data


def scale_of(data: ad.AnnData) -> dict[str, float]:
    return data.uns["spatial"]["x1"]["scalefactors"]


def test_a_section_of_a_set_has_the_counts_of_its_source(section: ad.AnnData, tiny_source: Path):
    source = open_source(tiny_source, samples=["x1"])[0].read()
    assert section.obs_names.tolist() == source.spot_ids
    np.testing.assert_allclose(section.obsm["spatial"], source.xy)
    order = [section.var_names.tolist().index(s) for s in source.gene_ids]
    np.testing.assert_array_equal(section.X.toarray()[:, order], source.counts.toarray())
    assert section.var["gene_ids"].str.startswith("ENSG").all()


@pytest.mark.parametrize("kind", ["section", "prediction"])
def test_spatialdata_holds_everything(kind: str, section: ad.AnnData, prediction: ad.AnnData, tmp_path: Path):
    spatialdata = pytest.importorskip("spatialdata")
    data = section if kind == "section" else prediction
    data.write_h5ad(tmp_path / "a.h5ad")
    assert main(["convert", str(tmp_path / "a.h5ad"), "--out", str(tmp_path / "a.zarr")]) == 0
    store = spatialdata.read_zarr(tmp_path / "a.zarr")
    table = store.tables["table"]
    np.testing.assert_array_equal(sparse.csr_matrix(table.X).toarray(), sparse.csr_matrix(data.X).toarray())
    assert table.obs_names.tolist() == data.obs_names.tolist()
    assert table.var_names.tolist() == data.var_names.tolist()
    for key in data.layers:
        np.testing.assert_array_equal(table.layers[key], data.layers[key])
    for key in data.obsm:
        np.testing.assert_array_equal(table.obsm[key], data.obsm[key])
    if kind == "prediction":
        assert table.uns["comtip"]["model"] == "m"
    circles = store.shapes["spots"]
    np.testing.assert_allclose(np.column_stack([circles.geometry.x, circles.geometry.y]), data.obsm["spatial"])
    assert circles["radius"].iloc[0] == pytest.approx(scale_of(data)["spot_diameter_fullres"] / 2)
    hires = data.uns["spatial"]["x1"]["images"]["hires"]
    np.testing.assert_array_equal(np.moveaxis(np.asarray(store.images["hires"].data), 0, 2), hires)
    # The image fills the same px as the spots, and micrometres are px times the scale.
    extent = spatialdata.get_extent(store.images["hires"], coordinate_system="global")
    assert extent["x"][1] == pytest.approx(hires.shape[1] / scale_of(data)["tissue_hires_scalef"], rel=1e-6)
    um = spatialdata.get_centroids(store.shapes["spots"], coordinate_system=MICRONS).compute()
    np.testing.assert_allclose(um[["x", "y"]], data.obsm["spatial"] * scale_of(data)["microns_per_pixel"])


def test_our_reader_reads_the_spatialdata_of_a_section(section: ad.AnnData, tmp_path: Path, tiny_shards: ShardSet):
    pytest.importorskip("spatialdata")
    assert main(["convert", f"{tiny_shards.path}:x1", "--out", str(tmp_path / "x1.zarr")]) == 0
    facts = {"tissue": "breast", "species": "human", "mpp": str(scale_of(section)["microns_per_pixel"])}
    read = open_source(tmp_path / "x1.zarr", overrides=facts)[0].read()
    np.testing.assert_array_equal(read.counts.toarray(), section.X.toarray())
    scale = scale_of(section)["tissue_hires_scalef"]
    np.testing.assert_allclose(read.xy, section.obsm["spatial"] * scale, atol=1e-6)
    assert read.meta.mpp == pytest.approx(scale_of(section)["microns_per_pixel"] / scale)


@pytest.mark.parametrize("reader", ["scanpy", "squidpy", "comtip"])
def test_space_ranger_files_are_read_back(reader: str, section: ad.AnnData, tmp_path: Path, tiny_shards: ShardSet):
    assert main(["convert", f"{tiny_shards.path}:x1", "--out", str(tmp_path / "outs")]) == 0
    if reader == "comtip":
        matrix = TenxMatrix(tmp_path / "outs" / MATRIX, (tmp_path / "outs" / MATRIX,))
        counts, barcodes, features = matrix.read(matrix.features())
        np.testing.assert_array_equal(counts.toarray(), section.X.toarray())
        assert (barcodes, features.ids) == (section.obs_names.tolist(), section.var["gene_ids"].tolist())
        return
    library = pytest.importorskip(reader)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = library.read_visium(tmp_path / "outs") if reader == "scanpy" else library.read.visium(tmp_path / "outs")
    assert read.obs_names.tolist() == section.obs_names.tolist()
    assert read.var["gene_ids"].tolist() == section.var["gene_ids"].tolist()
    np.testing.assert_array_equal(read.X.toarray(), section.X.toarray())
    np.testing.assert_allclose(np.asarray(read.obsm["spatial"], float), section.obsm["spatial"])
    library_id = next(iter(read.uns["spatial"]))
    shown = read.uns["spatial"][library_id]["images"]["hires"]
    assert shown.shape == section.uns["spatial"]["x1"]["images"]["hires"].shape


def test_spatialdata_io_reads_the_files_and_our_reader_its_store(
    section: ad.AnnData, tmp_path: Path, tiny_source: Path
):
    spatialdata_io = pytest.importorskip("spatialdata_io")
    write_space_ranger(section, tmp_path / "outs")
    store = spatialdata_io.visium(tmp_path / "outs", dataset_id="x1")
    table, circles = store.tables["table"], store.shapes["x1"]
    assert table.obs_names.tolist() == section.obs_names.tolist()
    assert table.var["gene_ids"].tolist() == section.var["gene_ids"].tolist()
    np.testing.assert_array_equal(table.X.toarray(), section.X.toarray())
    xy = np.column_stack([circles.geometry.x, circles.geometry.y])
    np.testing.assert_allclose(xy, np.rint(section.obsm["spatial"]))
    assert circles["radius"].iloc[0] == pytest.approx(scale_of(section)["spot_diameter_fullres"] / 2)
    shown = np.moveaxis(np.asarray(store.images["x1_hires_image"].data), 0, 2)
    np.testing.assert_array_equal(shown, section.uns["spatial"]["x1"]["images"]["hires"])

    store.write(tmp_path / "x1.zarr")
    facts = {
        "tissue": "breast",
        "species": "human",
        "platform": "ST 1k array",
        "mpp": scale_of(section)["microns_per_pixel"],
    }
    read = open_source(tmp_path / "x1.zarr", overrides=facts)[0].read()
    source = open_source(tiny_source, samples=["x1"])[0].read()
    assert read.spot_ids == source.spot_ids
    np.testing.assert_allclose(read.xy, np.rint(source.xy))
    order = [section.var["gene_ids"].tolist().index(g) for g in read.gene_ids]
    np.testing.assert_array_equal(read.counts.toarray(), section.X.toarray()[:, order])


def test_predicted_values_keep_their_fractions(prediction: ad.AnnData, tmp_path: Path):
    scanpy = pytest.importorskip("scanpy")
    write_space_ranger(prediction, tmp_path / "outs")
    read = scanpy.read_10x_h5(tmp_path / "outs" / MATRIX)
    np.testing.assert_allclose(read.X.toarray(), prediction.X, rtol=1e-6)


def test_an_embedding_becomes_spatialdata_only(prediction: ad.AnnData, tmp_path: Path):
    pytest.importorskip("spatialdata")
    data = prediction[:, []].copy()
    store = to_spatialdata(data)
    np.testing.assert_array_equal(store.tables["table"].obsm[OBSM_EMBEDDING], prediction.obsm[OBSM_EMBEDDING])
    with pytest.raises(SourceError, match=r"no expression.*write a \.zarr"):
        write_space_ranger(data, tmp_path / "outs")
    assert not (tmp_path / "outs").exists()


ARRAYS: dict[str, tuple[dict[str, list[float]], str]] = {
    "Visium": ({"array_row": [0, 1, 2], "array_col": [0, 1, 4]}, ""),
    "square": ({"array_row": [0, 0, 1], "array_col": [0, 1, 0]}, "not hexagonal as on Visium slides"),
    "fractions": ({"array_row": [0, 1.02, 2], "array_col": [0, 0.98, 4]}, "were rounded"),
    "cells": ({"array_row": [0, 0, 0], "array_col": [0, 0, 2]}, "the same array_row and array_col"),
    "no array": ({}, "has no array_row and no array_col: spots are numbered"),
    "no column": ({"array_row": [0, float("nan"), 2]}, "has no array_col: spots are numbered"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_what_space_ranger_files_cannot_hold_is_reported(name: str):
    obs, note = ARRAYS[name]
    data = ad.AnnData(obs=pd.DataFrame(obs, index=pd.Index(list("abc"))))
    found = array_notes(data)
    assert len(found) == bool(note)
    assert note in "".join(found)
    if "are numbered" in note:  # also the column that obs has, which belongs to no other
        data.obsm["spatial"] = np.zeros((3, 2))
        assert positions_table(data)[["array_row", "array_col"]].to_numpy().tolist() == [[0, 0], [1, 1], [2, 2]]


def test_inputs_of_other_kinds_are_named(tmp_path: Path):
    with pytest.raises(SourceError, match=r"^https://host/set:x1: a URL, but a conversion reads local files only"):
        read_section("https://host/set:x1")
    with pytest.raises(SourceError, match=r"a folder without manifest\.json.*build a shard set of this folder first"):
        read_section(tmp_path)


def test_a_spot_name_that_is_a_formula_is_refused(section: ad.AnnData, tmp_path: Path):
    data = section.copy()
    data.obs_names = ["=cmd()", *data.obs_names[1:]]
    with pytest.raises(SourceError, match=r"the spot name '=cmd\(\)' would be evaluated as a formula"):
        write_space_ranger(data, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_spot_without_an_array_position_is_refused():
    data = ad.AnnData(
        obs=pd.DataFrame({"array_row": [0, float("nan")], "array_col": [0, 1]}, index=pd.Index(["a", "b"]))
    )
    with pytest.raises(SourceError, match="array_row or array_col has no value for 1 of "):
        array_notes(data)


def test_what_cannot_be_converted_is_refused_and_nothing_is_left(section: ad.AnnData, tmp_path: Path, capsys):
    section.write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "there").mkdir()
    for out, message in (
        ("there", "exists; remove it"),
        ("b.h5ad", "give NAME.zarr for SpatialData"),
        ("no/b.zarr", "does not exist; create it first"),
    ):
        assert main(["convert", str(tmp_path / "a.h5ad"), "--out", str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err
    section[:, :0].write_h5ad(tmp_path / "empty.h5ad")
    assert main(["convert", str(tmp_path / "empty.h5ad"), "--out", str(tmp_path / "outs")]) == 2
    assert "empty.h5ad: the section has no expression" in capsys.readouterr().err
    bare = section.copy()
    del bare.uns["spatial"]
    with pytest.raises(SourceError, match=r"no image in.*write a \.zarr"):
        write_space_ranger(bare, tmp_path / "outs")
    two = section.copy()
    two.uns["spatial"] = {"a": two.uns["spatial"]["x1"], "b": two.uns["spatial"]["x1"]}
    with pytest.raises(SourceError, match="holds 2 sections"):
        to_spatialdata(two)
    twice = section.copy()
    twice.obs_names = ["same"] * twice.n_obs
    with pytest.raises(SourceError, match="spot names are not unique"):
        write_space_ranger(twice, tmp_path / "outs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad", "empty.h5ad", "there"]


@pytest.mark.parametrize("kind", ["16 bits", "floats to 255", "alpha", "grey values of 8 bits in 64"])
def test_the_picture_is_the_one_that_our_readers_see(kind: str, section: ad.AnnData, tmp_path: Path):
    data = section.copy()
    images = data.uns["spatial"]["x1"]["images"]
    rgb = images["hires"].copy()
    opaque = np.full((*rgb.shape[:2], 1), 255, np.uint8)
    images["hires"] = {
        "16 bits": rgb.astype(np.uint16) * 257,
        "floats to 255": rgb.astype(np.float32),
        "alpha": np.concatenate([rgb, opaque], axis=2),
        "grey values of 8 bits in 64": rgb.astype(np.int64),
    }[kind]
    write_space_ranger(data, tmp_path / "outs")
    with Image.open(tmp_path / "outs/spatial/tissue_hires_image.png") as image:
        np.testing.assert_array_equal(np.asarray(image), rgb)


def test_positions_and_scale_factors_as_other_tools_write_them(section: ad.AnnData, tmp_path: Path):
    data = section.copy()
    xy = pd.DataFrame(np.asarray(section.obsm["spatial"])[:, ::-1], index=data.obs_names, columns=["row", "col"])
    data.obsm["spatial"] = xy
    data.obs["array_row"] = pd.Categorical(data.obs["array_row"].astype(int).astype(str))
    factors = data.uns["spatial"]["x1"]["scalefactors"]
    factors |= {"tissue_hires_scalef": np.array([factors["tissue_hires_scalef"]]), "fiducial_diameter_fullres": "NA"}
    data.write_h5ad(tmp_path / "a.h5ad")
    assert main(["convert", str(tmp_path / "a.h5ad"), "--out", str(tmp_path / "outs")]) == 0
    table = pd.read_csv(tmp_path / "outs/spatial/tissue_positions.csv")
    np.testing.assert_allclose(table[["pxl_col_in_fullres", "pxl_row_in_fullres"]], section.obsm["spatial"])
    np.testing.assert_array_equal(table["array_row"], section.obs["array_row"])
    written = json.loads((tmp_path / "outs/spatial/scalefactors_json.json").read_text())
    assert written["tissue_hires_scalef"] == pytest.approx(scale_of(section)["tissue_hires_scalef"])
    assert written["fiducial_diameter_fullres"] == written["spot_diameter_fullres"]


def test_one_section_of_several_is_converted_by_its_name(section: ad.AnnData, tmp_path: Path, capsys):
    both = ad.concat({"A": section, "B": section}, label="library_id", index_unique="-")
    both.uns["spatial"] = dict.fromkeys("AB", section.uns["spatial"]["x1"])
    both.write_h5ad(tmp_path / "both.h5ad")
    assert main(["convert", f"{tmp_path / 'both.h5ad'}:B", "--out", str(tmp_path / "outs")]) == 0
    table = pd.read_csv(tmp_path / "outs/spatial/tissue_positions.csv")
    assert table["barcode"].tolist() == [f"{name}-B" for name in section.obs_names]
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "both.h5ad"), "--out", str(tmp_path / "x")]) == 2
    assert "2 sections (A, B); name one of them, e.g. " in capsys.readouterr().err


def test_names_that_spatialdata_forbids_and_its_own_columns_are_kept(
    section: ad.AnnData, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    spatialdata = pytest.importorskip("spatialdata")
    data = section.copy()
    columns = {"region": "tumour", "spot": "s7", "n genes (%)": 1.0, "Total": 2.0, "total": 3.0, "__x": 4.0}
    for name, value in columns.items():
        data.obs[name] = value
    data.obs["yes"] = pd.array([True, None] * (data.n_obs // 2) + [None] * (data.n_obs % 2), dtype="boolean")
    data.layers["log norm"] = data.X.copy()
    data.var["gene name"] = data.var_names
    entry = data.uns["spatial"]["x1"]
    entry["images"] = {"downscaled_fullres": entry["images"]["hires"]}
    entry["scalefactors"]["tissue_downscaled_fullres_scalef"] = entry["scalefactors"].pop("tissue_hires_scalef")
    data.write_h5ad(tmp_path / "a b.h5ad")
    assert main(["convert", str(tmp_path / "a b.h5ad"), "--out", str(tmp_path / "a b.zarr")]) == 0
    for old, new in (("n genes (%)", "n_genes____"), ("total", "total_1"), ("log norm", "log_norm"), ("__x", "_x")):
        assert f"{old!r} to {new!r}" in caplog.text
    store = spatialdata.read_zarr(tmp_path / "a b.zarr")
    table = store.tables["table"]
    found = {name: table.obs[name].iloc[0] for name in ("region", "spot", "n_genes____", "Total", "total_1", "_x")}
    assert list(found.values()) == list(columns.values())
    assert table.obs["yes"].isna().sum() == data.obs["yes"].isna().sum()
    np.testing.assert_array_equal(sparse.csr_matrix(table.layers["log_norm"]).toarray(), data.X.toarray())
    names = {"spatial_element_names": "spots", "table_name": "table"}
    joined = spatialdata.join_spatialelement_table(sdata=store, **names)[1]
    assert joined.obs_names.tolist() == data.obs_names.tolist()
    extent = spatialdata.get_extent(store.images["downscaled_fullres"], coordinate_system="global")
    scale = entry["scalefactors"]["tissue_downscaled_fullres_scalef"]
    assert extent["x"][1] == pytest.approx(entry["images"]["downscaled_fullres"].shape[1] / scale, rel=1e-6)
    assert store.shapes["spots"]["radius"].iloc[0] == pytest.approx(scale_of(data)["spot_diameter_fullres"] / 2)
    assert MICRONS in store.coordinate_systems


def test_the_scale_is_kept_without_an_image(section: ad.AnnData):
    pytest.importorskip("spatialdata")
    data = section.copy()
    del data.uns["spatial"]["x1"]["images"]
    store = to_spatialdata(data)
    assert MICRONS in store.coordinate_systems
    assert store.shapes["spots"]["radius"].iloc[0] == pytest.approx(scale_of(data)["spot_diameter_fullres"] / 2)


def test_space_ranger_files_state_what_the_table_states(section: ad.AnnData, tmp_path: Path):
    scanpy = pytest.importorskip("scanpy")
    data = section.copy()
    outside = [0] * 5 + [1] * (data.n_obs - 5)
    data.obs["in_tissue"] = pd.array(outside, dtype="Int64")
    data.var["feature_types"] = ["Antibody Capture", *["Gene Expression"] * (data.n_vars - 1)]
    data.var["genome"] = "GRCh38"
    data.var["gene_ids"] = [None, *data.var["gene_ids"].iloc[1:]]
    counts = data.X.toarray().astype(np.int64)
    counts[0, 0] = 3 * 2**31
    data.X = counts
    entry = data.uns["spatial"]["x1"]
    hires, scale = entry["images"]["hires"], entry["scalefactors"]["tissue_hires_scalef"]
    entry["images"]["lowres"] = hires[::4, ::4].copy()
    entry["scalefactors"]["tissue_lowres_scalef"] = scale / 4
    write_space_ranger(data, tmp_path / "outs")
    read = scanpy.read_visium(tmp_path / "outs")
    assert read.obs["in_tissue"].tolist() == outside
    assert read.n_vars == data.n_vars - 1  # scanpy leaves antibodies out
    read = scanpy.read_10x_h5(tmp_path / "outs" / MATRIX, gex_only=False)
    assert read.var["feature_types"].tolist() == data.var["feature_types"].tolist()
    assert set(read.var["genome"]) == {"GRCh38"}
    assert read.var["gene_ids"].iloc[0] == data.var_names[0]
    np.testing.assert_array_equal(read.X.toarray(), counts.astype(np.float32))
    library = next(iter(scanpy.read_visium(tmp_path / "outs").uns["spatial"].values()))
    assert library["images"]["lowres"].shape == hires[::4, ::4].shape
    assert library["scalefactors"]["tissue_lowres_scalef"] == pytest.approx(scale / 4)
    # An image under another name keeps its scale, and scales of images that are not written are left out.
    entry["images"] = {"lowres": entry["images"]["lowres"]}
    write_space_ranger(data, tmp_path / "low")
    factors = json.loads((tmp_path / "low/spatial/scalefactors_json.json").read_text())
    assert factors["tissue_hires_scalef"] == factors["tissue_lowres_scalef"] == pytest.approx(scale / 4)
    del entry["scalefactors"]["tissue_lowres_scalef"]
    with pytest.raises(SourceError, match=r"tissue_lowres_scalef is missing.*correct it in uns"):
        write_space_ranger(data, tmp_path / "none")


@pytest.mark.parametrize("what", ["spot name", "gene name", "gene id"])
def test_names_at_which_scanpy_fails_are_refused(what: str, section: ad.AnnData, tmp_path: Path):
    data = section.copy()
    if what == "spot name":
        data.obs_names = ["é", *data.obs_names[1:]]
    elif what == "gene name":
        data.var_names = ["TGFβ", *data.var_names[1:]]
    else:
        data.var["gene_ids"] = ["TGFβ", *data.var["gene_ids"].iloc[1:]]
    with pytest.raises(SourceError, match=rf"the {what} '.*' has characters outside ASCII.*write a \.zarr"):
        write_space_ranger(data, tmp_path / "out")


@pytest.mark.parametrize("name", ["7", "007", "0.50", "NA", ""])
def test_names_that_pandas_changes_are_refused(name: str, section: ad.AnnData, tmp_path: Path):
    """scanpy would have the spots without their positions, and raise no error."""
    data = section.copy()
    data.obs_names = [name, *data.obs_names[1:]] if name in ("NA", "") else [f"{name}{i}" for i in range(data.n_obs)]
    with pytest.raises(SourceError, match="as a number or as missing; rename the spots"):
        write_space_ranger(data, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_conversion_does_not_change_the_matrix_of_its_input(section: ad.AnnData, tmp_path: Path):
    matrix = section.X.tocsr().copy()
    matrix.data[0] = 0
    data = section.copy()
    data.X = matrix.copy()
    write_space_ranger(data, tmp_path / "out")
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(data.X, part), getattr(matrix, part))


def test_half_precision_is_written(section: ad.AnnData, tmp_path: Path):
    data = section.copy()
    data.X = section.X.toarray().astype(np.float16)
    write_space_ranger(data, tmp_path / "out")
    with h5py.File(tmp_path / "out" / MATRIX) as file:
        assert file["matrix/data"].dtype == np.int32
        assert file["matrix/data"][()].sum() == section.X.sum()


def test_a_grey_picture_is_refused_with_a_fix_that_a_conversion_has(section: ad.AnnData, tmp_path: Path):
    data = section.copy()
    images = data.uns["spatial"]["x1"]["images"]
    images["hires"] = images["hires"][..., 0]
    with pytest.raises(SourceError, match=r"expected \(height, width, 3\); correct it in uns\['spatial'\]"):
        write_space_ranger(data, tmp_path / "out")


def test_positions_under_another_key(section: ad.AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = section.copy()
    data.obsm["X_warped"] = data.obsm["spatial"] + 7
    data.write_h5ad(tmp_path / "a.h5ad")
    command = ["convert", str(tmp_path / "a.h5ad"), "--out", str(tmp_path / "outs")]
    for key in ("X_other", ""):
        assert main([*command, "--positions", key]) == 2
    errors = capsys.readouterr().err
    assert "no obsm['X_other']; set --positions to the key" in errors
    assert main([*command, "--positions", "X_warped"]) == 0
    table = pd.read_csv(tmp_path / "outs" / "spatial" / "tissue_positions.csv", index_col=0)
    written = table.loc[data.obs_names, ["pxl_col_in_fullres", "pxl_row_in_fullres"]]
    np.testing.assert_allclose(written, data.obsm["X_warped"], atol=0.5)


def test_a_section_without_spots_is_refused(section: ad.AnnData, tmp_path: Path):
    section[:0].write_h5ad(tmp_path / "none.h5ad")
    with pytest.raises(SourceError, match=r"none\.h5ad: the section has no spots"):
        read_section(tmp_path / "none.h5ad")


@pytest.mark.parametrize(("dtype", "value"), [(np.uint8, 200), (np.float32, 2**31 - 1)])
def test_counts_beyond_their_type_are_not_wrapped(section: ad.AnnData, tmp_path: Path, dtype: type, value: int):
    """Duplicate entries are summed, and float32 rounds 2^31 - 1 to 2^31, which int32 does not hold."""
    data = section.copy()
    n = data.n_obs
    entries = (np.full(2 * n, value, dtype), np.zeros(2 * n, int), np.arange(n + 1) * 2)
    data.X = sparse.csr_matrix(entries, shape=data.shape)
    write_space_ranger(data, tmp_path / "out")
    with h5py.File(tmp_path / "out" / MATRIX) as file:
        np.testing.assert_array_equal(file["matrix/data"][()], np.full(n, 2.0 * np.float32(value)))
