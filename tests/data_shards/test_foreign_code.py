"""Sources are data: no codec of a store executes code, and no file exposes the content of another one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
from comtip_shards import SourceError
from comtip_shards.sources import detect, open_source
from comtip_shards.sources.files.zarr_metadata import CODECS, check_store
from comtip_shards.sources.hdf5.opening import open_hdf5
from comtip_shards.sources.patches import read_patches
from comtip_shards.sources.tenx.matrix import TenxMatrix

from comtip_fast.cli import main
from comtip_fast.data.anndata_file import read_h5ad
from testkit.tenx import write_h5

FACTS = {"tissue": "breast", "mpp": "1.25", "species": "human"}


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


# -- Zarr ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["2", "3"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SpatialData store of Zarr's format 2 or 3."""
    spatialdata = pytest.importorskip("spatialdata")
    from spatialdata._io.format import SpatialDataContainerFormatV01
    from spatialdata.models import Image2DModel, ShapesModel, TableModel

    xy = np.stack(np.meshgrid(np.arange(1, 5) * 40.0, np.arange(1, 4) * 40.0), -1).reshape(-1, 2)
    table = ad.AnnData(np.ones((12, 2), np.float32))
    table.var["gene_ids"] = ["ENSG00000141736", "ENSG00000186847"]
    table.obs["region"], table.obs["spot"] = "spots", np.arange(12)
    table.obs["region"] = table.obs["region"].astype("category")
    data = spatialdata.SpatialData(
        images={"he": Image2DModel.parse(np.zeros((3, 200, 200), np.uint8), dims=("c", "y", "x"))},
        shapes={"spots": ShapesModel.parse(xy, geometry=0, radius=5.0)},
        tables={"table": TableModel.parse(table, region="spots", region_key="region", instance_key="spot")},
    )
    path = tmp_path_factory.mktemp("store") / "run.zarr"
    data.write(path, **({"sdata_formats": SpatialDataContainerFormatV01()} if request.param == "2" else {}))
    return path


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "run.zarr"))


def arrays(folder: Path) -> list[Path]:
    """Return the metadata file of every array."""
    v3 = [p for p in folder.rglob("zarr.json") if json.loads(p.read_text())["node_type"] == "array"]
    return sorted([*folder.rglob(".zarray"), *v3])


def edit(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_in_a_store_is_never_run_whatever_numcodecs_allows(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pickles = pytest.importorskip("numcodecs.pickles")
    # What numcodecs did without asking up to 0.16.5.
    monkeypatch.setattr(pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    assert open_source(copy, overrides=FACTS)[0].read().counts.shape == (12, 2)
    names = copy / "tables/table/var/_index"
    if (names / ".zarray").is_file():
        edit(names / ".zarray", lambda m: m.update(compressor={"id": "pickle", "protocol": 5}))
        (names / "0").write_bytes(pickle.dumps(Payload(tmp_path / "was_run")))
        (copy / ".zmetadata").unlink(missing_ok=True)
    else:
        edit(names / "zarr.json", lambda m: m.update(codecs=[*m["codecs"][:1], {"name": "numcodecs.pickle"}]))
        (names / "c/0").write_bytes(pickle.dumps(Payload(tmp_path / "was_run")))
    with pytest.raises(
        SourceError, match=r"_index/.*: the codec '(numcodecs\.)?pickle' is not allowed.*write it again"
    ):
        open_source(copy, overrides=FACTS)
    assert not (tmp_path / "was_run").exists()
    assert main(["shards", "build", str(copy), "--out", str(tmp_path / "out"), "--tissue", "x", "--mpp", "1.25"]) != 0
    assert not (tmp_path / "was_run").exists()


EVIL = {
    "pickle": {"id": "pickle"},
    "v3 pickle": {"name": "numcodecs.pickle", "configuration": {"protocol": 5}},
    "a text": "pickle",
    "id and name": {"id": "zstd", "name": "pickle"},
    "unknown": {"id": "somebody_elses_codec"},
    "in capitals": {"id": "PICKLE"},
    "no name": {},
    "a number": {"id": 7},
    "a list": {"id": ["pickle"]},
    "in a shard": {"name": "sharding_indexed", "configuration": {"codecs": ["bytes", {"name": "pickle"}]}},
    "in a shard's index": {"name": "sharding_indexed", "configuration": {"index_codecs": [{"name": "pickle"}]}},
    "deep": {
        "name": "sharding_indexed",
        "configuration": {
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {"codecs": [{"id": "zlib", "filters": [{"id": "pickle"}]}]},
                }
            ]
        },
    },
}


@pytest.mark.parametrize("key", ["compressor", "filters", "codecs", "storage_transformers", "serializer"])
@pytest.mark.parametrize("name", EVIL)
def test_only_listed_codecs_pass_wherever_they_are_named(tmp_path: Path, name: str, key: str):
    for file, meta in {
        ".zarray": {"zarr_format": 2, key: [EVIL[name]]},
        "a/b/.zarray": {"zarr_format": 2, key: EVIL[name]},
        ".zmetadata": {"metadata": {"x/.zattrs": {}, "x/.zarray": {key: [EVIL[name]]}}},
        "zarr.json": {"consolidated_metadata": {"metadata": {"x": {"node_type": "array", key: [EVIL[name]]}}}},
        "c/0/zarr.json": {"node_type": "array", key: [{"name": "bytes"}, EVIL[name]]},
    }.items():
        root = tmp_path / file.replace("/", "_")
        (root / file).parent.mkdir(parents=True)
        (root / file).write_text(json.dumps(meta))
        with pytest.raises(SourceError, match=rf"{file}: the codec .* is not allowed"):
            check_store(root)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not the metadata"),
        (b"[" * 100_000, "not the metadata"),
        (b"\xff\xfe\x00", "not the metadata"),
        (json.dumps({"filters": [{"id": "pickle"}]}).encode("utf-16"), "the codec 'pickle'"),
    ],
)
def test_metadata_that_cannot_be_understood_is_refused(tmp_path: Path, data: bytes, message: str):
    (tmp_path / ".zarray").write_bytes(data)
    with pytest.raises(SourceError, match=rf"\.zarray.* {message}"):
        check_store(tmp_path)


def test_metadata_that_is_a_pipe_or_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / ".zarray")
    with pytest.raises(SourceError, match=r"\.zarray: not a regular file"):
        check_store(tmp_path)
    (tmp_path / ".zarray").unlink()
    with (tmp_path / ".zarray").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SourceError, match="bytes of metadata"):
        check_store(tmp_path)


def test_links_in_a_store_are_not_followed(copy: Path, tmp_path: Path):
    chunk = next(p for p in copy.rglob("*") if p.name in ("0", "1") and p.is_file())
    chunk.unlink()
    chunk.symlink_to("/etc/hostname")
    with pytest.raises(SourceError, match="is a link, and links in a store are not followed"):
        open_source(copy, overrides=FACTS)
    (tmp_path / "by_link.zarr").symlink_to(copy)
    chunk.unlink()
    check_store(tmp_path / "by_link.zarr")  # the store itself may be given by a link


def test_what_zarr_and_spatialdata_write_passes(store: Path, tmp_path: Path):
    check_store(store)
    zarr = pytest.importorskip("zarr")
    import numcodecs

    root = zarr.open_group(tmp_path / "v2", mode="w", zarr_format=2)
    for codec in (
        numcodecs.Blosc(),
        numcodecs.Zstd(),
        numcodecs.LZ4(),
        numcodecs.Zlib(),
        numcodecs.GZip(),
        numcodecs.BZ2(),
        numcodecs.LZMA(),
        None,
    ):
        name = "raw" if codec is None else codec.codec_id
        root.create_array(name, shape=(8,), dtype="i4", compressors=codec, filters=[numcodecs.Shuffle(4)])
    root.create_array("text", shape=(8,), dtype=str)
    root.attrs["filters"] = [{"id": "pickle"}]  # an attribute names no codec
    check_store(tmp_path / "v2")
    root = zarr.open_group(tmp_path / "v3", mode="w", zarr_format=3)
    root.create_array("sharded", shape=(64,), chunks=(8,), shards=(32,), dtype="f4")
    root.create_array("text", shape=(8,), dtype=str)
    root.attrs["codecs"] = ["pickle"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(tmp_path / "v3")
    check_store(tmp_path / "v3")
    assert "pickle" not in CODECS


# -- HDF5 ---------------------------------------------------------------------------------------------------------


def external_link(file: h5py.File, name: str, other: Path) -> None:
    del file[name]
    file[name] = h5py.ExternalLink(str(other), "/secret")


def soft_link(file: h5py.File, name: str, other: Path) -> None:
    file.move(name, "elsewhere")
    file[name] = h5py.SoftLink("/elsewhere")


def circle(file: h5py.File, name: str, other: Path) -> None:
    file["uns_of_somebody/again"] = h5py.SoftLink("/uns_of_somebody")


def external_storage(file: h5py.File, name: str, other: Path) -> None:
    old = file[name]
    shape, dtype, attrs = old.shape, old.dtype, dict(old.attrs)
    del file[name]
    fixed = dtype if dtype.kind != "O" else np.dtype("S16")
    new = file.create_dataset(name, shape, fixed, external=[(str(other), 0, h5py.h5f.UNLIMITED)])
    new.attrs.update(attrs)


def virtual(file: h5py.File, name: str, other: Path) -> None:
    old = file[name]
    shape, dtype, attrs = old.shape, old.dtype, dict(old.attrs)
    del file[name]
    layout = h5py.VirtualLayout(shape, dtype if dtype.kind != "O" else np.dtype("S16"))
    layout[...] = h5py.VirtualSource(str(other), "secret", shape)
    file.create_virtual_dataset(name, layout).attrs.update(attrs)


TRICKS = {
    external_link: "an external link",
    soft_link: "a soft link",
    circle: "a soft link",
    external_storage: "stored in another file",
    virtual: "a virtual dataset",
}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "secret.h5"
    with h5py.File(path, "w") as file:
        file["secret"] = np.full((12, 2), 77.0)
    return path


@pytest.fixture
def h5ad(tmp_path: Path) -> Path:
    xy = np.stack(np.meshgrid(np.arange(1, 5) * 40.0, np.arange(1, 4) * 40.0), -1).reshape(-1, 2)
    data = ad.AnnData(np.ones((12, 2), np.float32), obsm={"spatial": xy})
    data.var["gene_ids"] = ["ENSG00000141736", "ENSG00000186847"]
    picture, factors = np.zeros((200, 200, 3), np.uint8), {"tissue_hires_scalef": 1.0, "spot_diameter_fullres": 10.0}
    data.uns["spatial"] = {"s1": {"images": {"hires": picture}, "scalefactors": factors}}
    data.write_h5ad(tmp_path / "s1.h5ad")
    return tmp_path / "s1.h5ad"


@pytest.mark.parametrize("name", ["X", "obsm/spatial", "obs/_index", "uns/spatial/s1/images/hires", "uns"])
@pytest.mark.parametrize("trick", TRICKS)
def test_an_h5ad_shows_nothing_of_other_files(h5ad: Path, other: Path, name: str, trick: Callable, tmp_path: Path):
    if name == "uns" and trick in (external_storage, virtual):
        pytest.skip("a group has no storage")
    with h5py.File(h5ad, "r+") as file:
        trick(file, name, other)
    told = rf"s1\.h5ad: '/.*' is {TRICKS[trick]}.*write the file again"
    assert detect(h5ad)[0].name == "anndata"
    with pytest.raises(SourceError, match=told):
        open_source(h5ad, overrides=FACTS)
    with pytest.raises(SourceError, match=told):
        read_h5ad(h5ad)
    assert main(["shards", "build", str(h5ad), "--out", str(tmp_path / "out"), "--tissue", "x", "--mpp", "1"]) != 0


@pytest.mark.parametrize("name", ["matrix/data", "matrix/indices", "matrix/barcodes", "matrix/features/id"])
@pytest.mark.parametrize("trick", TRICKS)
def test_a_matrix_of_10x_shows_nothing_of_other_files(tmp_path: Path, other: Path, name: str, trick: Callable):
    path = tmp_path / "filtered_feature_bc_matrix.h5"
    write_h5(path, np.ones((3, 4), int), [f"B{i}" for i in range(4)], ["ENSG1", "ENSG2", "ENSG3"], ["A", "B", "C"])
    matrix = TenxMatrix(path, (path,))
    assert matrix.read(matrix.features())[0].sum() == 12
    with h5py.File(path, "r+") as file:
        trick(file, name, other)
    with pytest.raises(SourceError, match=rf"matrix\.h5: '/.*' is {TRICKS[trick]}.*write the file again"):
        matrix.read(matrix.features())


@pytest.mark.parametrize("name", ["coords", "barcode", "img"])
@pytest.mark.parametrize("trick", TRICKS)
def test_patches_show_nothing_of_other_files(tmp_path: Path, other: Path, name: str, trick: Callable):
    path = tmp_path / "ID.h5"
    with h5py.File(path, "w") as file:
        file["coords"], file["barcode"] = np.zeros((2, 2), int), np.array([[b"a"], [b"b"]], "S1")
        file["img"] = np.zeros((2, 8, 8, 3), np.uint8)
    assert read_patches(path, 0.5).has_pixels
    with h5py.File(path, "r+") as file:
        trick(file, name, other)
    with pytest.raises(SourceError, match=rf"ID\.h5: '/.*' is {TRICKS[trick]}"):
        read_patches(path, 0.5)


def test_circles_of_hard_links_end_and_deep_files_are_refused(tmp_path: Path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["group/data"] = np.arange(3)
        file["group/again"] = file["group"]
        file["group/root"] = file["/"]
    with open_hdf5(path, "an HDF5 file", "download it again") as file:
        assert file["group/again/data"][1] == 1
    with h5py.File(path, "w") as file:
        file.create_group("/".join(["g"] * 100))
    with pytest.raises(SourceError, match="64 levels of groups"):
        open_hdf5(path, "an HDF5 file", "download it again")
