"""A message is true, and its advice works, in every branch of the condition that raises it."""

from __future__ import annotations

import gzip
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from comtip_shards import SourceError
from comtip_shards.errors import ShardError
from comtip_shards.format import manifest as manifest_format
from comtip_shards.format.tar_index import index_tar
from comtip_shards.names import FOREIGN
from comtip_shards.reader.shard_set import ShardSet
from comtip_shards.sections.section import check_unique
from comtip_shards.sources import hest, open_source
from comtip_shards.sources.anndata_parts import store
from comtip_shards.sources.base import CatalogueRow, named, pick
from comtip_shards.sources.files.opening import existing, fix_of, reading
from comtip_shards.sources.files.table_size import check_table_size
from comtip_shards.sources.geometry import ScaleCheck
from comtip_shards.sources.selection.choose import choose
from comtip_shards.sources.tenx.run import only
from comtip_shards.sources.visium_hd_parts.scale import scale_of
from comtip_shards.storage.cache import default_size

SAMPLES = Path(__file__).parents[2] / "data_shards/samples"


def test_a_name_that_occurs_often_is_counted_once():
    with pytest.raises(SourceError, match=r"ids: 1 occurs more than once, e\.g\. a;"):
        check_unique(["a"] * 4 + ["b"], "ids")


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (MemoryError("12 GiB"), "more memory"),
        (PermissionError(13, "Permission denied"), "change its permissions"),
        (OSError("unable to open file: errno = 13, error message = 'Permission denied'"), "change its permissions"),
        (OSError(28, "No space left on device"), "free disk space"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid"), "save it as UTF-8"),
        (ValueError("damaged"), "copy or download it again"),
    ],
)
def test_the_fix_is_that_of_the_error(tmp_path: Path, error: Exception, fix: str):
    assert fix in fix_of(error)
    (tmp_path / "a.tsv").write_text("x")
    with pytest.raises(SourceError, match=fix), reading(tmp_path / "a.tsv", "a table"):
        raise error


def test_exhausted_memory_is_no_damage_of_the_files():
    with pytest.raises(SourceError, match=r"too large for the memory.*more memory"), named("section a", ()):
        raise MemoryError("12 GiB")


def test_a_pipe_and_a_dangling_link_are_named(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="a pipe or a device"):
        existing(tmp_path / "pipe", "table")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(SourceError, match="a link to a file that does not exist"):
        existing(tmp_path / "link", "table")
    with pytest.raises(SourceError, match="a link to a path that does not exist"):
        open_source(tmp_path / "link")


def test_a_url_is_printed_as_it_was_given():
    with pytest.raises(SourceError, match=r"^memory://a/b: no section 'x'"):
        pick(["x"], ["y"], "memory://a/b")


def test_a_filter_names_the_filters_before_it(tmp_path: Path):
    rows = [CatalogueRow("a", "human", "breast"), CatalogueRow("b", "mouse", "brain")]
    with pytest.raises(SourceError, match="no section with species human has tissue brain; choose from: breast"):
        choose(rows, {"species": ["human"], "tissue": ["brain"]}, tmp_path, lambda row: row)


def test_a_larger_table_than_allowed_is_not_to_be_unpacked(tmp_path: Path):
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(b"x" * 1000))
    with pytest.raises(SourceError, match="more than 500, the maximum for this table; check that it is the right file"):
        check_table_size(path, 500)


def test_files_of_one_name_are_distinguished_by_their_folder(tmp_path: Path):
    paths = [tmp_path / genome / "matrix.mtx" for genome in ("GRCh38", "mm10")]
    with pytest.raises(SourceError, match=r"more than one matrix: GRCh38/matrix\.mtx, mm10/matrix\.mtx"):
        only(paths, "matrix")


def test_a_stated_scale_replaces_one_that_is_not_positive(tmp_path: Path):
    assert scale_of({"microns_per_pixel": 0.0}, tmp_path, 0.5) == 0.5
    with pytest.raises(SourceError, match="missing or not a positive number; set `mpp`"):
        scale_of({"microns_per_pixel": 0.0}, tmp_path, None)
    with pytest.raises(SourceError, match="instead of 1; correct `mpp`"):
        scale_of({"bin_size_um": 16.0, "spot_diameter_fullres": 32.0}, tmp_path, 1.0)


def test_a_scale_of_zero_in_hest_is_not_stated(tmp_path: Path):
    metadata = {"pixel_size_um_estimated": 0, "pixel_size_um_embedded": 0.5}
    assert list(hest._own_scales(tmp_path, "a", metadata)) == [("pixel_size_um_embedded", 0.5)]


def test_the_scale_to_set_is_that_of_the_positions():
    section = open_source(SAMPLES)[0].read()
    factor = 0.1  # tiles from a downscaled image, positions in px of the full resolution
    wrong = replace(section, meta=replace(section.meta, mpp=section.meta.mpp * 10))
    with pytest.raises(SourceError, match="correct the scale in the source or set `mpp`") as error:
        ScaleCheck(None, trusted=False, factor=factor)(wrong)
    right = float(str(error.value).split("which gives ")[1].split()[0])
    assert right == pytest.approx(section.meta.mpp * factor, rel=0.1)
    same = replace(section, xy=np.zeros_like(section.xy))
    with pytest.raises(SourceError, match="spots have the same position; correct the positions"):
        ScaleCheck(None, trusted=False)(same)


def test_a_filter_that_the_plugins_lack_is_not_to_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        file["obs"] = np.zeros(3)
    monkeypatch.setattr(store, "_missing_plugin", lambda root, key: "an unknown filter (HDF5 filter 40000)")
    monkeypatch.setattr(store, "read_elem", lambda item: (_ for _ in ()).throw(OSError("no filter")))
    with h5py.File(tmp_path / "a.h5ad") as file:
        for installed in (True, False):
            monkeypatch.setattr(store, "_has_plugins", lambda found=installed: found)
            with pytest.raises(SourceError, match="write the file with compression='gzip'") as error:
                store.read_part(file, "obs", tmp_path / "a.h5ad")
            assert ("pip install" in str(error.value)) is not installed
        with pytest.raises(SourceError, match=r"a\.h5ad: no var; write the file again with anndata"):
            store.read_part(file, "var", tmp_path / "a.h5ad")


@pytest.mark.parametrize("size", ["-5", "0", "nan", "inf", "much"])
def test_the_size_of_the_cache_is_positive(monkeypatch: pytest.MonkeyPatch, size: str):
    monkeypatch.setenv("COMTIP_CACHE_GB", size)
    with pytest.raises(ShardError, match=f"COMTIP_CACHE_GB={size}: not a positive number"):
        default_size()


def test_a_shard_with_the_right_hash_is_not_to_be_copied(tmp_path: Path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * tarfile.BLOCKSIZE)
    with pytest.raises(ShardError) as error:
        index_tar(path, fix=FOREIGN)
    assert str(error.value).endswith(FOREIGN)
    with pytest.raises(ShardError, match="copy the shard again"):
        index_tar(path)


def test_a_shard_of_too_many_records_is_named(tiny_shards: ShardSet):
    found = replace(tiny_shards.manifest, records_per_shard=1)
    with pytest.raises(ShardError, match=r"t1-0000\.tar states \d+ records, more than records_per_shard \(1\)"):
        manifest_format._check(found, "m")
