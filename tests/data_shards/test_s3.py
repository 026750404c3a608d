"""A set behind a real S3 server that is slow, throttles or cuts bodies: the same records, or an error that names the URL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from comtip_shards import ShardError, ShardSet
from comtip_shards.storage.cache import file_system_of
from comtip_shards.storage.remote import Remote, RetryPolicy

from comtip_fast.data.loaders.fetch_ahead import fetched_ahead
from comtip_fast.data.loaders.schedule import ScheduledBatch
from testkit.s3 import S3, s3_server

pytest.importorskip("moto.server", reason="nightly: make nightly installs moto's S3 server (extra s3-test)")
pytest.importorskip("s3fs", reason="nightly: make nightly installs s3fs (extra s3-test)")
QUICK = RetryPolicy(attempts=4, stall=20, total=200, backoff=0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as state:
        yield state


@pytest.fixture(scope="module")
def url(server: S3, tiny_shards: ShardSet) -> str:
    return server.upload(tiny_shards.path, "tiny")


@pytest.fixture
def s3(server: S3) -> Iterator[S3]:
    server.gets.clear()
    yield server
    server.fault = ""


def opened(s3: S3, url: str, cache: Path, *, ranges: bool = False, retry: RetryPolicy = QUICK) -> ShardSet:
    shards = ShardSet(url, remote=Remote(url, cache, storage_options=s3.options, retry=retry))
    shards.files.ranges = ranges
    return shards


@pytest.mark.parametrize("ranges", [False, True], ids=["files", "ranges"])
@pytest.mark.parametrize("fault", ["", "slow", "busy", "cut"])
def test_the_records_are_those_of_the_folder(
    s3: S3, url: str, tiny_shards: ShardSet, tmp_path: Path, fault: str, ranges: bool
):
    s3.fault = fault
    shards = opened(s3, url, tmp_path, ranges=ranges)
    spots = np.array([3, 40, 41, 42, 7, len(tiny_shards) - 1])
    for part in ("tile", "expr"):
        assert shards.members(spots, part) == tiny_shards.members(spots, part)
    assert bool(list(tmp_path.rglob("*.tar"))) != ranges


def test_ranges_fetch_what_is_read_and_a_cached_shard_nothing(s3: S3, url: str, tiny_shards: ShardSet, tmp_path: Path):
    shards = opened(s3, url, tmp_path)
    first = tiny_shards.manifest.shards[0]
    with shards.files.by_ranges():
        shards.counts(np.array([first.first_spot + 2]))
    fetched = s3.bytes_of(".tar")
    assert 0 < fetched < first.bytes / 10
    shards.tiles(np.array([first.first_spot]))
    assert s3.bytes_of(".tar") == fetched + first.bytes
    with shards.files.by_ranges():
        shards.counts(np.array([first.first_spot + 3]))
    assert s3.bytes_of(".tar") == fetched + first.bytes


@pytest.mark.parametrize("ranges", [False, True], ids=["files", "ranges"])
def test_a_server_that_stays_down_is_reported(s3: S3, url: str, tmp_path: Path, ranges: bool):
    shards = opened(s3, url, tmp_path, ranges=ranges, retry=RetryPolicy(attempts=2, stall=20, total=60, backoff=0.01))
    shards.counts(np.array([0]))  # manifest, tables and the index of the first shard
    s3.fault, last = "down", len(shards) - 1
    start = time.monotonic()
    with pytest.raises(ShardError, match=rf"{url}/.*not fetched \(attempts: 2;.*check the network") as error:
        shards.tiles(np.array([last]))
    assert error.value.kind == "remote"
    assert time.monotonic() - start < 60


def test_a_damaged_range_is_not_accepted(s3: S3, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shards = opened(s3, url, tmp_path, ranges=True)
    plain = Remote.read_ranges

    def flipped(self: Remote, name: str, spans: list[tuple[int, int]]) -> list[bytes]:
        return [bytes([data[0] ^ 1]) + data[1:] for data in plain(self, name, spans)]

    monkeypatch.setattr(Remote, "read_ranges", flipped)
    with pytest.raises(ShardError, match="does not match its CRC-32") as error:
        shards.tiles(np.array([0]))
    assert error.value.kind == "checksum"


def test_the_next_batches_are_fetched_ahead_once(s3: S3, url: str, tmp_path: Path):
    shards = opened(s3, url, tmp_path)
    n = len(shards.manifest.shards)
    first = [np.array([shard.first_spot, shard.first_spot + 1]) for shard in shards.manifest.shards]
    batches = (ScheduledBatch(0, i, i + 1, spots) for i, spots in enumerate(first * 2))
    ahead = fetched_ahead(batches, shards, n, rank=0, world=1)
    assert next(ahead).position == 0
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("??/*/*.tar"))) < n and time.monotonic() < until:
        time.sleep(0.05)
    assert len(list(tmp_path.glob("??/*/*.tar"))) == n, "no batch has been read, but its tars are there"
    assert [b.position for b in islice(ahead, 3)] == [1, 2, 3]
    shards.tiles(np.concatenate(first))
    assert all(len(sizes) == 1 for path, sizes in s3.gets.items() if path.endswith(".tar"))


def test_a_cache_on_a_file_server_is_recognised(tmp_path: Path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "30 22 0:40 / /home rw,relatime shared:1 - nfs4 server:/home rw\n"
        "31 30 8:2 / /home/local\\040disk rw - xfs /dev/sdb rw\n"
    )
    assert file_system_of(Path("/home/me/.cache/comtip"), mounts) == "nfs4"
    assert file_system_of(Path("/home/local disk/x"), mounts) == "xfs"
    assert file_system_of(Path("/homes"), mounts) == "ext4"
    assert file_system_of(Path("/x"), tmp_path / "none") == ""
