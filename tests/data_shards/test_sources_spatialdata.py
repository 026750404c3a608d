"""SpatialData stores as spatialdata writes them: regions, instances, transformations, lazy images."""

import shutil
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from comtip_shards import SourceError
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import detect, open_source

from testkit.option_reads import declared, fields_read

spatialdata = pytest.importorskip("spatialdata")
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel  # noqa: E402
from spatialdata.transformations import Affine, Identity, Scale  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
ENSEMBL = ["ENSG00000141736", "ENSG00000186847", "ENSG00000019582"]
FACTS = {"tissue": "breast", "mpp": "0.625"}  # of the positions; the image has half their resolution
XY = np.stack(np.meshgrid(np.arange(1, 5) * 160.0, np.arange(1, 4) * 160.0), -1).reshape(-1, 2)
"""Centres in the common system; the image is scaled by 2 into it."""
COUNTS = np.random.default_rng(0).poisson(3, (12, 3))


def picture() -> np.ndarray:
    """(3, 400, 500): red encodes the column, green the row."""
    y, x = np.mgrid[0:400, 0:500]
    return np.stack([x / 2, y / 2, np.full(x.shape, 90)]).astype(np.uint8)


def table(region: str, order: np.ndarray, counts: np.ndarray = COUNTS) -> ad.AnnData:
    obs = pd.DataFrame(
        {"region": pd.Categorical([region] * 12), "spot": order, "in_tissue": [0] + [1] * 11},
        index=[f"BC{i}-1" for i in order],
    )
    var = pd.DataFrame({"gene_ids": ENSEMBL}, index=["ERBB2", "KRT14", "CD74"])
    data = ad.AnnData(counts[order].astype(np.float32), obs, var)
    return TableModel.parse(data, region=region, region_key="region", instance_key="spot")


def store(order: np.ndarray | None = None):
    order = np.random.default_rng(1).permutation(12) if order is None else order
    into = {"global": Scale([2.0, 2.0], axes=("x", "y"))}
    image = Image2DModel.parse(picture(), dims=("c", "y", "x"), scale_factors=[2], transformations=into)
    small = Image2DModel.parse(
        picture()[:, ::4, ::4], dims=("c", "y", "x"), transformations={"global": Scale([8.0, 8.0], axes=("x", "y"))}
    )
    dapi = Image2DModel.parse(np.zeros((5, 800, 800), np.uint16), dims=("c", "y", "x"))
    # The spots' own coordinates are shifted by (10, 20) from the common ones.
    shift = Affine([[1, 0, 10], [0, 1, 20], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    spots = ShapesModel.parse(XY - [10, 20], geometry=0, radius=35.0, transformations={"global": shift})
    return spatialdata.SpatialData(
        images={"he": image, "small": small, "dapi": dapi},
        shapes={"spots": spots},
        tables={"table": table("spots", order)},
    )


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd") / "run.zarr"
    store().write(path)
    return path


def write(data, path: Path) -> Path:
    data.write(path)
    return path


def test_a_region_is_read_through_its_transformations(store_path: Path):
    assert (detect(store_path)[0].name, detect(store_path)[1]) == ("spatialdata", "zarr.json has spatialdata_attrs")
    section = open_source(store_path, overrides=FACTS)[0].read()
    order = np.array([int(i[2:-2]) for i in section.spot_ids])
    assert section.dropped == {"not in tissue": 1}
    np.testing.assert_allclose(section.xy, XY[order] / 2)
    np.testing.assert_array_equal(section.counts.toarray(), COUNTS[order])
    assert section.gene_ids == ENSEMBL
    assert section.gene_symbols[0] == "ERBB2"
    meta = section.meta
    assert (meta.section_id, meta.species, meta.mpp, meta.spot_pitch_um) == ("spots", "human", 1.25, 100)
    assert section.image_path == store_path / "images/he"
    assert "tiles are cut from the image he, in the coordinate system global" in section.notes
    with section.open_slide() as slide:
        assert slide.size == (500, 400)
        assert slide.levels == [(500, 400), (250, 200)]
        tiles = slide.tiles(section.xy, 1.25, 40.0, 16, 0.5).astype(float)
    np.testing.assert_allclose(tiles[..., :2].mean((1, 2)), section.xy / 2, atol=1)


def test_another_image_may_be_asked_for(store_path: Path):
    section = open_source(store_path, overrides={"tissue": "x", "platform": "Visium", "image": "small"})[0].read()
    assert section.meta.mpp == pytest.approx(100 / 20)
    assert section.meta.spot_diameter_um == 55
    with pytest.raises(SourceError, match="no image 'big'; set `image` to one of"):
        open_source(store_path, overrides=FACTS | {"image": "big"})
    with pytest.raises(
        SourceError, match=r"the image dapi is not a three-channel image .* of spots; set `image` to one"
    ):
        open_source(store_path, overrides=FACTS | {"image": "dapi"})
    with pytest.raises(SourceError, match="image he: no scale; set `mpp`, the um per px of the positions"):
        open_source(store_path, overrides={"tissue": "x"})
    with pytest.raises(SourceError, match="neither obs nor uns of table states one tissue for spots; set `tissue`"):
        open_source(store_path, overrides={"mpp": "1"})


def test_labels_are_regions_too(tmp_path: Path):
    labels = np.zeros((400, 500), np.int32)
    for i in range(12):
        row, column = divmod(i, 4)
        labels[60 + 100 * row : 80 + 100 * row, 50 + 100 * column : 70 + 100 * column] = i + 1
    data = store(np.arange(12))
    data.labels["bins"] = Labels2DModel.parse(labels, dims=("y", "x"), transformations={"global": Identity()})
    data.images["flat"] = Image2DModel.parse(picture(), dims=("c", "y", "x"), transformations={"global": Identity()})
    cells = table("bins", np.arange(12))
    cells.obs["spot"] += 1
    data.tables["cells"] = cells
    path = write(data, tmp_path / "a.zarr")
    sources = open_source(path, overrides=FACTS | {"image": "flat"})
    assert sorted(s.meta.section_id for s in sources) == ["bins", "spots"]
    section = open_source(path, samples=["bins"], overrides=FACTS | {"image": "flat"})[0].read()
    np.testing.assert_allclose(section.xy[0], [50 + 100 + 10, 60 + 10], atol=0.51)


def test_what_is_only_in_the_table_or_the_shapes_is_counted(tmp_path: Path):
    data = store(np.arange(12))
    data.tables["table"].obs.loc["BC5-1", "spot"] = 99
    section = open_source(write(data, tmp_path / "a.zarr"), overrides=FACTS)[0].read()
    assert section.dropped == {
        "not in tissue": 1,
        "table rows without a shape": 1,
        "shapes without a table row": 1,
    }
    assert len(section.spot_ids) == 10


def test_counts_may_be_a_layer(tmp_path: Path):
    data = store(np.arange(12))
    data.tables["table"].layers["counts"] = data.tables["table"].X.copy()
    data.tables["table"].X = np.log1p(data.tables["table"].X)
    section = open_source(write(data, tmp_path / "a.zarr"), overrides=FACTS)[0].read()
    np.testing.assert_array_equal(section.counts.toarray(), COUNTS[1:])
    del data.tables["table"].layers["counts"]
    with pytest.raises(SourceError, match=r"b\.zarr: .*not an integer"):
        open_source(write(data, tmp_path / "b.zarr"), overrides=FACTS)[0].read()


def test_a_set_is_built_from_it(store_path: Path, tmp_path: Path):
    report = build_shards(
        open_source(store_path, overrides=FACTS), tmp_path / "set", tile_px=16, tile_um=50.0, min_mpp=2.0
    )
    assert report.n_spots == 11


def test_errors_of_bad_stores_name_the_file_and_the_fix(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = store(np.arange(12))
    data.tables["table"].obs["spot"] += 100
    with pytest.raises(SourceError, match=r"a\.zarr: table and spots share no id: 100, 101"):
        open_source(write(data, tmp_path / "a.zarr"), overrides=FACTS)[0].read()
    data = store()
    del data.tables["table"]
    with pytest.raises(SourceError, match=r"b\.zarr: no table annotates a region"):
        open_source(write(data, tmp_path / "b.zarr"), overrides=FACTS)
    broken = Path(shutil.copytree(store_path, tmp_path / "c.zarr"))
    for path in (broken / "images/he/s0/c/0").rglob("0"):
        if path.is_file():
            path.write_bytes(b"not a chunk")
    with pytest.raises(SourceError, match=r"he: the block at row 0.* of level 0 cannot be decoded"):
        open_source(broken, overrides=FACTS)[0].read().load_image()
    (broken / "tables/table/zarr.json").write_text("{")
    with pytest.raises(
        SourceError,
        match=r"c\.zarr: (not a SpatialData store that can be read|cannot be read as a SpatialData store)|c\.zarr: no table annotates",
    ):
        open_source(broken, overrides=FACTS)
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    with pytest.raises(SourceError, match=r"pip install 'comtip-fast\[spatialdata\]'"):
        open_source(store_path, overrides=FACTS)


def test_every_declared_option_is_read(store_path: Path, tmp_path: Path):
    assert fields_read(store_path, **FACTS) == declared(store_path) - {"round_counts"}
    data = store()
    data.tables["table"].X = data.tables["table"].X + 0.5
    assert fields_read(write(data, tmp_path / "halves.zarr"), **FACTS) == declared(store_path)
