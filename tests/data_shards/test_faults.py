"""Errors are specific and affect no other records; remote sets read like local ones, or raise a clear error."""

from __future__ import annotations

import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from comtip_shards import ShardError, ShardSet, SourceError
from comtip_shards.reader.verify import verify
from comtip_shards.storage.remote import Remote, RetryPolicy

from comtip_fast.data.sections import TileGeometry, open_section
from testkit.shards import change_manifest, rewrite

QUICK = RetryPolicy(attempts=2, stall=0.5, total=2, backoff=0.01)


@pytest.fixture
def copy(tiny_shards: ShardSet, tmp_path: Path) -> Path:
    shutil.copytree(tiny_shards.path, tmp_path / "set")
    return tmp_path / "set"


def test_a_damaged_record_costs_no_other(copy: Path, tiny_shards: ShardSet):
    rewrite(copy / "shards/t1-0000.tar", lambda m: m.update({"000000003.jpg": m["000000003.jpg"][:-1] + b"x"}))
    shards = ShardSet(copy)
    with pytest.raises(ShardError, match=r"t1-0000\.tar: record 000000003.*CRC-32") as error:
        shards.members(range(20), "tile")
    assert error.value.kind == "checksum"
    rest = [s for s in range(len(shards)) if s != 3]
    assert shards.members(rest, "tile") == tiny_shards.members(rest, "tile")


def test_a_vanished_shard_costs_its_records_only(copy: Path):
    (copy / "shards/t1-0000.tar").unlink()
    shards = ShardSet(copy)
    shards.tiles(range(49, 60))
    for _ in range(2):
        with pytest.raises(ShardError, match=r"t1-0000\.tar: the shard is missing") as error:
            shards.tiles([0])
        assert error.value.kind == "vanished"


def test_a_damaged_index_costs_its_shard(copy: Path):
    (copy / "shards/t1-0000.idx").write_text("v1.2 49\n")
    shards = ShardSet(copy)
    shards.tiles([50])
    with pytest.raises(ShardError, match=r"t1-0000\.idx: the index does not match its SHA-256") as error:
        shards.tiles([0])
    assert error.value.kind == "index"
    assert "t1-0000.idx" in verify(copy).text


def test_a_damaged_table_of_spots_costs_the_set(copy: Path):
    data = bytearray((copy / "spots.parquet").read_bytes())
    data[200] ^= 1
    (copy / "spots.parquet").write_bytes(data)
    with pytest.raises(ShardError, match=r"spots\.parquet: the spot table does not match its SHA-256"):
        ShardSet(copy).tiles([0])
    assert "spots.parquet" in verify(copy).text


def test_a_fault_survives_the_way_from_a_worker_process():
    error = pickle.loads(pickle.dumps(ShardError("a.tar: gone", kind="vanished")))
    assert (str(error), error.kind) == ("a.tar: gone", "vanished")


# -- remote sets ------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tiny_shards: ShardSet) -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    fs.put(str(tiny_shards.path), "/bucket/set", recursive=True)
    yield fs
    fs.rm("/bucket", recursive=True)


def remote(cache: Path) -> Remote:
    return Remote("memory://bucket/set", cache, retry=QUICK)


def test_a_remote_set_reads_like_a_local_one(bucket: object, tiny_shards: ShardSet, tmp_path: Path):
    far = ShardSet("memory://bucket/set", remote=remote(tmp_path))
    assert far.name == "memory://bucket/set"
    np.testing.assert_array_equal(far.tiles([0, 100, 49]), tiny_shards.tiles([0, 100, 49]))
    assert far.spots.equals(tiny_shards.spots)
    assert far.genes == tiny_shards.genes
    np.testing.assert_array_equal(far.overview(1)[0], tiny_shards.overview(1)[0])
    report = verify("memory://bucket/set", remote=remote(tmp_path))
    assert report.ok, report.text
    assert report.records == len(tiny_shards)


def test_a_file_url_needs_no_cache(tiny_shards: ShardSet):
    near = ShardSet(f"file://{tiny_shards.path}")
    assert near.path == tiny_shards.path
    assert near.members([5], "expr") == tiny_shards.members([5], "expr")


def test_a_section_of_a_remote_set_is_a_section(bucket: object, tiny_shards: ShardSet, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COMTIP_CACHE", str(tmp_path))
    spec = TileGeometry(32, 224.0, 5.0)
    far, near = (open_section(f"{p}:x1", spec) for p in ("memory://bucket/set", tiny_shards.path))
    np.testing.assert_array_equal(far.tiles.all(), near.tiles.all())
    assert far.template.obs_names.tolist() == near.template.obs_names.tolist()
    assert far.template.obs_names[:2].tolist() == ["1x1", "2x1"]  # in the order of the source, not of the shards
    with pytest.raises(SourceError, match=r"a URL must name a section of a shard set.* download"):
        open_section("memory://bucket/set", spec)


def test_a_remote_shard_that_is_damaged_or_gone(bucket: fsspec.AbstractFileSystem, tmp_path: Path):
    bucket.pipe("/bucket/set/shards/t1-0000.tar", b"x" + bucket.cat("/bucket/set/shards/t1-0000.tar")[1:])
    bucket.rm("/bucket/set/shards/t2-0000.tar")
    shards = ShardSet("memory://bucket/set", remote=remote(tmp_path))
    start = time.monotonic()
    for spot in range(49):
        # Reported once, not 49 times.
        with pytest.raises(
            ShardError,
            match=r"memory://bucket/set/shards/t1-0000\.tar: the received content does not match .* upload it again",
        ):
            shards.tiles([spot])
    with pytest.raises(ShardError, match=r"memory://bucket/set/shards/t2-0000\.tar: no such file"):
        shards.tiles([50])
    shards.tiles([100])
    assert time.monotonic() - start < 5
    text = verify("memory://bucket/set", remote=remote(tmp_path)).text
    assert "t1-0000.tar: the received content does not match" in text
    assert "t2-0000.tar: no such file" in text


def test_a_cached_copy_that_was_damaged_is_fetched_again(bucket: object, tiny_shards: ShardSet, tmp_path: Path):
    shards = ShardSet("memory://bucket/set", remote=remote(tmp_path))
    shards.tiles([0])
    (path,) = tmp_path.rglob("t1-0000.tar")
    path.write_bytes(b"\0" * path.stat().st_size)
    np.testing.assert_array_equal(shards.tiles([0]), tiny_shards.tiles([0]))
    path.unlink()
    np.testing.assert_array_equal(shards.tiles([0]), tiny_shards.tiles([0]))


def test_a_remote_manifest_is_always_the_one_that_is_there(
    bucket: fsspec.AbstractFileSystem, copy: Path, tmp_path: Path
):
    first = ShardSet("memory://bucket/set", remote=remote(tmp_path / "c")).manifest.digest
    change_manifest(copy, lambda m: m.update(fingerprint="other"), seal=True)
    bucket.put(str(copy / "manifest.json"), "/bucket/set/manifest.json")
    assert ShardSet("memory://bucket/set", remote=remote(tmp_path / "c")).manifest.digest != first
    bucket.rm("/bucket/set/manifest.json")
    with pytest.raises(ShardError, match=r"memory://bucket/set/manifest\.json: no such file"):
        ShardSet("memory://bucket/set", remote=remote(tmp_path / "c"))
