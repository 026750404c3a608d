"""Kinds of damage that escaped the readers once: each is refused by file, before memory or time is spent."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import tifffile
from comtip_shards import SourceError
from comtip_shards.not_data import not_data
from comtip_shards.slides import open as images
from comtip_shards.slides.open import open_slide
from comtip_shards.sources import open_source
from comtip_shards.sources.anndata_parts import store
from comtip_shards.sources.anndata_parts.store import open_store
from comtip_shards.sources.files import table_size
from comtip_shards.sources.files.packaging import is_gzip, read_packed, unpacked
from comtip_shards.sources.files.tables import as_counts, read_counts_table, read_table
from comtip_shards.sources.geometry import median_gap
from comtip_shards.sources.tenx.matrix import TenxMatrix
from scipy import sparse

from comtip_fast.data.anndata_file import read_h5ad
from testkit.source_fuzz.corpus import SPATIAL_FACTS, anndata, anndata_dense, visium_mex
from testkit.tenx import write_h5


def replaced(file: h5py.File, name: str, values: object) -> None:
    attrs = dict(file[name].attrs)
    del file[name]
    file[name] = values
    file[name].attrs.update(attrs)


def index_beyond_the_shape(file: h5py.File) -> None:
    values = file["X/indices"][()]
    values[3] = 10**6
    replaced(file, "X/indices", values)


def negative_index(file: h5py.File) -> None:
    values = file["X/indices"][()]
    values[3] = -1
    replaced(file, "X/indices", values)


def claimed(file: h5py.File, name: str) -> None:
    attrs, dtype = dict(file[name].attrs), file[name].dtype
    del file[name]
    file.create_dataset(name, (2 * 10**7,), dtype, chunks=(1000,), compression="gzip")
    file[name].attrs.update(attrs)


def obs_is_a_matrix(file: h5py.File) -> None:
    del file["obs"]
    file.copy(file["X"], "obs")


DAMAGE: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    # With these indices scipy reads memory that is not the matrix's, and the process ends.
    "index beyond the shape": (index_beyond_the_shape, "X is damaged"),
    "negative index": (negative_index, "X is damaged"),
    "data longer than indices": (lambda f: claimed(f, "X/data"), "X has data of shape"),
    "a column longer than its table": (lambda f: claimed(f, "obs/array_row"), "columns of obs have different lengths"),
    "obs is a matrix": (obs_is_a_matrix, "obs is csr_matrix, expected a table"),
    "X is a list": (lambda f: (f.pop("X"), f.create_dataset("X", data=np.arange(3.0))), "X (is|cannot be read)"),
    "one row of positions less": (
        lambda f: replaced(f, "obsm/spatial", f["obsm/spatial"][:-1]),
        "obsm.spatial has 23 rows, but obs has 24",
    ),
    "spots at one position": (
        lambda f: replaced(f, "obsm/spatial", np.full((24, 2), 50.0)),
        "most spots have the same position as another one",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_h5ad(tmp_path: Path, name: str):
    path = anndata(tmp_path)
    damage, message = DAMAGE[name]
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(SourceError, match=rf"a\.h5ad: {message}"):
        open_source(path, overrides=SPATIAL_FACTS)[0].read()


@pytest.mark.parametrize("shape", [(24 * 10**5, 116), (24, 10**7)], ids=["rows", "columns"])
@pytest.mark.parametrize(("layer", "key"), [("X", "X"), ("counts", "layers/counts"), ("raw", "raw/X")])
def test_a_dense_matrix_of_another_shape_is_refused_before_it_is_read(
    tmp_path: Path, layer: str, key: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    path = anndata(tmp_path)
    with h5py.File(path, "r+") as file:
        if key == "raw/X":
            file.copy("var", file.require_group("raw"), "var")
        if key in file:
            del file[key]
        file.create_dataset(key, shape, np.int8, chunks=(24, 58), compression="gzip")
    read: list[int] = []
    plain = h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda s, at: (read.append(s.size), plain(s, at))[1])
    with pytest.raises(
        SourceError, match=rf"a\.h5ad: {key} has [\d,]+ (rows|columns), but (obs|var|raw/var) has \d+ rows"
    ):
        open_source(path, overrides=SPATIAL_FACTS | {"layer": layer})[0].read()
    assert max(read) < 10**5


@pytest.mark.parametrize(
    ("key", "shape"), [("X", (24, 24, 10**4)), ("obsm/more", (23, 10**4)), ("obsm/more", (25, 3, 10**4))]
)
def test_a_matrix_of_another_form_is_refused_before_it_is_read(
    tmp_path: Path, key: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    path = anndata(tmp_path)
    with h5py.File(path, "r+") as file:
        file.pop(key, None)
        file.create_dataset(key, shape, np.int8, chunks=True, compression="gzip")
    read: list[int] = []
    plain = h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda s, at: (read.append(s.size), plain(s, at))[1])
    message = rf"a\.h5ad: {key} (is of shape|has \d+ rows, but obs has 24)"
    with pytest.raises(SourceError, match=message):
        read_h5ad(path)
    with pytest.raises(SourceError, match=message), open_store(path) as opened:
        _ = opened[key]
    assert max(read, default=0) < 10**5


def test_an_attribute_that_cannot_be_read_is_refused_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Found by the fuzz: the shape is read from attributes, which can be damaged, too."""
    path = anndata(tmp_path)

    def damaged(*_: object) -> None:
        raise OSError("ran off end of input buffer")

    monkeypatch.setattr(store, "_shape_of", damaged)
    with pytest.raises(SourceError, match=r"a\.h5ad: cannot be read as \.h5ad \(ran off end"):
        read_h5ad(path)
    with (
        pytest.raises(SourceError, match=r"a\.h5ad: X cannot be read \(OSError: ran off end"),
        open_store(path) as opened,
    ):
        _ = opened["X"]


DOUBLED = {
    "negative": ([3, -1], np.int64, "negative"),
    "fractions": ([0.5, 0.5], np.float64, "not an integer"),
    "beyond int64": ([2**63 - 1, 2**63 - 1, 5], np.int64, "too large"),
    "float32": ([2**24, 1, 1], np.float32, 2**24 + 2),
    "bool": ([1, 1], np.bool_, 2),
}


@pytest.mark.parametrize("name", DOUBLED)
def test_doubled_entries_are_checked_one_by_one_and_summed(name: str):
    values, dtype, wanted = DOUBLED[name]
    matrix = sparse.csr_matrix((np.array(values, dtype), np.zeros(len(values), int), [0, len(values)]), shape=(1, 1))
    if isinstance(wanted, str):
        with pytest.raises(SourceError, match=rf"values that are not counts.*{wanted}; spot s, gene a"):
            as_counts(matrix, Path("m"), ["s"], ["a"])
    else:
        assert as_counts(matrix, Path("m"), ["s"], ["a"]).toarray().tolist() == [[wanted]]


def test_sums_above_int32_are_refused(tmp_path: Path):
    doubled = sparse.csr_matrix(
        (np.array([2**31 - 1, 1, 3], np.int32), np.array([0, 0, 1]), np.array([0, 3])), shape=(1, 2)
    )
    with pytest.raises(
        SourceError, match=r"m: 1 values that are not counts, the first is 2147483648 \(too large; spot s, gene a\)"
    ):
        as_counts(doubled, Path("m"), ["s"], ["a", "b"])
    largest = sparse.csr_matrix(np.array([[2**31 - 1]], np.float32))
    with pytest.raises(SourceError, match=r"the first is 2147483648 \(too large"):
        as_counts(largest, Path("m"), ["s"], ["a"])
    path = anndata(tmp_path)
    data = ad.read_h5ad(path)
    data.X = data.X.astype(np.int64)
    data.X[0, :2] = 2**31 - 1
    ids = data.var["gene_ids"].tolist()
    data.var["gene_ids"] = [ids[0], ids[0], *ids[2:]]
    data.write_h5ad(path)
    with pytest.raises(SourceError, match=rf"a\.h5ad: the columns of {ids[0]} sum to 4,294,967,294 in one spot"):
        open_source(path, overrides=SPATIAL_FACTS)[0].read()


def test_lists_of_a_10x_matrix_have_one_length(tmp_path: Path):
    path = tmp_path / "m.h5"
    write_h5(path, np.ones((3, 4), int), list("abcd"), ["E1", "E2", "E3"], ["A", "B", "C"])
    with h5py.File(path, "r+") as file:
        claimed(file, "matrix/features/name")
    with pytest.raises(SourceError, match=r"m\.h5: .*lists of different lengths"):
        TenxMatrix(path, (path,)).features()


@pytest.mark.parametrize("name", ["indptr", "shape", "barcodes"])
def test_lengths_of_a_10x_matrix_are_compared_before_they_are_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "m.h5"
    write_h5(path, np.ones((3, 4), int), list("abcd"), ["E1", "E2", "E3"], ["A", "B", "C"])
    with h5py.File(path, "r+") as file:
        claimed(file, f"matrix/{name}")
    matrix = TenxMatrix(path, (path,))
    features = matrix.features()
    read: list[int] = []
    plain = h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda s, key: (read.append(s.size), plain(s, key))[1])
    with pytest.raises(SourceError, match=r"m\.h5: (the matrix shape is|indptr is not)"):
        matrix.read(features)
    assert max(read, default=0) < 100


def zeros_in_one_row(group: h5py.Group, n: int) -> None:
    """Replace a sparse matrix by one of as many zeros in its last row or column, as a file of a few MB can hold by the billion."""
    pointer = np.zeros_like(group["indptr"][()])
    pointer[-1] = n
    for name, values in (("data", np.zeros(n, int)), ("indices", np.zeros(n, int)), ("indptr", pointer)):
        del group[name]
        group.create_dataset(name, data=values, compression="gzip")


def test_a_row_with_more_entries_than_elements_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, n = tmp_path / "m.h5", 1000
    write_h5(path, np.ones((3, 4), int), list("abcd"), ["E1", "E2", "E3"], ["A", "B", "C"])
    with h5py.File(path, "r+") as file:
        zeros_in_one_row(file["matrix"], n)
    source = anndata(tmp_path / "a")
    with h5py.File(source, "r+") as file:
        zeros_in_one_row(file["X"], n)
    read: list[int] = []
    plain = h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda s, key: (read.append(s.size), plain(s, key))[1])
    matrix = TenxMatrix(path, (path,))
    with pytest.raises(SourceError, match=r"m\.h5: 1,000 entries in row or column 3 of 3 elements"):
        matrix.read(matrix.features())
    with pytest.raises(SourceError, match=r"a\.h5ad: X: 1,000 entries in row or column \d+ of \d+ elements"):
        open_source(source, overrides=SPATIAL_FACTS)[0].read()
    assert max(read) < n


@pytest.mark.parametrize("values", [np.array([b"1"] * 12), np.ones(12, complex)])
def test_counts_of_a_10x_matrix_are_numbers(tmp_path: Path, values: np.ndarray):
    path = tmp_path / "m.h5"
    write_h5(path, np.ones((3, 4), int), list("abcd"), ["E1", "E2", "E3"], ["A", "B", "C"])
    with h5py.File(path, "r+") as file:
        replaced(file, "matrix/data", values)
    matrix = TenxMatrix(path, (path,))
    with pytest.raises(SourceError, match=r"m\.h5: the counts are .*not numbers"):
        matrix.read(matrix.features())


def test_a_matrix_market_header_that_claims_more_than_the_file_holds(tmp_path: Path):
    path = visium_mex(tmp_path / "v") / "filtered_feature_bc_matrix/matrix.mtx.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    at = next(i for i, line in enumerate(lines) if not line.startswith("%"))
    lines[at] = f"{lines[at].rsplit(' ', 1)[0]} {10**11}"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(SourceError, match=r"matrix\.mtx\.gz: .*claims 100,000,000,000 entries"):
        open_source(tmp_path / "v", overrides={"tissue": "breast", "image": "hires"})[0].read()


@pytest.mark.parametrize("read", [is_gzip, unpacked, read_packed, read_table, read_counts_table, open_slide])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to nothing"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, read: Callable[[Path], object], kind: str):
    path = tmp_path / "a.tsv"
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "link to nothing": lambda: path.symlink_to("/nowhere"),
    }[kind]()
    with pytest.raises(SourceError, match=r"a\.tsv: "):
        read(path)
    if kind == "pipe":
        assert "pipe" in str(not_data(path))


def test_damaged_and_endless_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.tsv.gz"
    text = "\tERBB2\tCD74\n" + "".join(f"s{i}\t{i % 7}\t{i % 5}\n" for i in range(3000))
    data = bytearray(gzip.compress(text.encode()))
    data[200:260] = bytes(range(60))
    path.write_bytes(bytes(data))
    for read in (read_table, read_counts_table):
        with pytest.raises(SourceError, match=r"a\.tsv\.gz: cannot be read as gzip"):
            read(path)
    path.write_bytes(gzip.compress(text.replace("s20\t6", f"s20\t{-(2**63)}").encode()))
    with pytest.raises(SourceError, match=r"a\.tsv\.gz: 1 values that are not counts, the first is .*negative"):
        read_counts_table(path)
    monkeypatch.setattr(table_size, "ALWAYS_UNPACKED", 1000)
    path.write_bytes(gzip.compress(b"\tA\n" + b"s\t0\n" * 10**6))
    with pytest.raises(SourceError, match=r"a\.tsv\.gz: .* bytes decompress to more than .*check the file"):
        read_counts_table(path)
    with (tmp_path / "b.tsv").open("wb") as file:
        file.truncate(1 << 40)
    for read in (read_table, read_counts_table):
        with pytest.raises(SourceError, match=r"b\.tsv: "):
            read(tmp_path / "b.tsv")
    with pytest.raises(SourceError, match="more than"):
        read_packed(tmp_path / "b.tsv")


def test_sparse_counts_are_read_as_before(tmp_path: Path):
    values = np.random.default_rng(0).poisson(0.4, (50, 7))
    rows = [f"s{i}," + ",".join(map(str, row)) for i, row in enumerate(values)]
    (tmp_path / "a.csv").write_text("," + ",".join("ABCDEFG") + "\n" + "\n".join(rows))
    counts, spots, genes = read_counts_table(tmp_path / "a.csv", ",")
    np.testing.assert_array_equal(counts.toarray(), values)
    assert (counts.dtype, len(spots), genes) == (np.int32, 50, list("ABCDEFG"))


def test_a_tiff_lists_every_tile_it_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "WINDOWED_PX", 0)
    path = tmp_path / "a.tif"
    options = {"photometric": "rgb", "tile": (64, 64), "compression": "deflate", "metadata": None}
    tifffile.imwrite(path, np.zeros((100, 150, 3), np.uint8), **options)
    data = path.read_bytes()
    height = data.index(b"\x01\x01\x04\x00\x01\x00\x00\x00")
    path.write_bytes(data[: height + 8] + (60_000).to_bytes(4, "little") + data[height + 12 :])
    with pytest.raises(SourceError, match=r"a\.tif: 150 x 60000 px need 2,814 tiles or strips, but 6 are listed"):
        open_slide(path)


def test_an_image_next_to_an_h5ad_may_be_missing(tmp_path: Path):
    path = anndata_dense(tmp_path)
    (tmp_path / "slide.png").unlink()
    with pytest.raises(SourceError, match=r"slide\.png: no such"):
        open_source(path, overrides=SPATIAL_FACTS | {"image": str(tmp_path / "slide.png")})[0].read()


def test_a_label_that_no_record_stores_is_refused_before_the_build(tmp_path: Path):
    path = anndata(tmp_path)
    data = ad.read_h5ad(path)
    data.obs["label"] = ["L" * 5000] * data.n_obs
    data.write_h5ad(path)
    with pytest.raises(
        SourceError, match=r"section a: a label of 5,000 characters .*at most 4,096 are stored; shorten it"
    ):
        open_source(path, overrides=SPATIAL_FACTS)[0].read()


def test_the_gap_of_equal_positions_takes_no_time():
    assert median_gap(np.zeros((10**5, 2))) == 0
    xy = np.array([[0.0, 0], [3, 0], [3, 0], [7, 0], [20, 0]])
    assert median_gap(xy) == 3
    assert median_gap(xy[[0, 1, 3]]) == 3
    assert np.isnan(median_gap(xy[:1]))


def test_a_byte_order_mark_is_no_part_of_a_gene(tmp_path: Path):
    """R writes a header without a name for the column of ids, so the first name is that of a gene."""
    path = tmp_path / "counts.tsv"
    path.write_bytes("ERBB2\tCD74\r\ns1\t1\t2\r\n".encode("utf-8-sig"))
    assert read_counts_table(path)[2] == ["ERBB2", "CD74"]
