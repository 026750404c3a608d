"""A damaged set is never read as a whole one: each fault names the shard, and verify finds it."""

import io
import json
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from comtip_shards import ShardError, ShardSet
from comtip_shards.order import epoch_batches
from comtip_shards.record import decode_expr, encode_expr
from comtip_shards.verify import verify
from PIL import Image


@pytest.fixture
def copy(tiny_shards: ShardSet, tmp_path: Path) -> Path:
    shutil.copytree(tiny_shards.path, tmp_path / "set")
    return tmp_path / "set"


def first_shard(folder: Path) -> Path:
    return folder / ShardSet(folder).manifest.shards[0].file


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def picture(size: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size)).save(out, "JPEG")
    return out.getvalue()


def test_a_whole_set_verifies(tiny_shards: ShardSet):
    report = verify(tiny_shards.path)
    assert report.ok, report.text
    assert report.records == len(tiny_shards)
    assert report.counts == int(tiny_shards.counts(range(len(tiny_shards))).sum())


FAULTS = {
    "tile of another size": (lambda m: m.update({"000000000.jpg": picture(48)}), "tiles", "48 x 48 px"),
    "huge tile": (lambda m: m.update({"000000000.jpg": picture(9000)}), "tiles", "9000 x 9000 px"),
    "tile is noise": (lambda m: m.update({"000000000.jpg": b"\xff\xd8nonsense"}), "tiles", "cannot be decoded"),
    "tile cut short": (lambda m: m.update({"000000000.jpg": m["000000000.jpg"][:200]}), "tiles", "cannot be decoded"),
    "tile gone": (lambda m: m.pop("000000000.jpg"), "tiles", r"member \.jpg is missing"),
    "counts gone": (lambda m: m.pop("000000000.expr"), "counts", r"member \.expr is missing"),
    "counts of another format": (lambda m: m.update({"000000000.expr": b"CTX2" + b"\0" * 4}), "counts", "not a count record"),
    "counts cut short": (lambda m: m.update({"000000000.expr": m["000000000.expr"][:-4]}), "counts", "bytes for"),
    "gene out of range": (lambda m: m.update({"000000000.expr": encode_expr(np.array([9999]), np.array([1]))}), "counts", "stay under"),
    "genes not ascending": (lambda m: m.update({"000000000.expr": encode_expr(np.array([2, 1]), np.array([1, 1]))}), "counts", "ascend"),
    "count of zero": (lambda m: m.update({"000000000.expr": encode_expr(np.array([2]), np.array([0]))}), "counts", "counts must be"),
    "spot of another section": (lambda m: m.update({"000000000.json": m["000000000.json"].replace(b'"t1"', b'"t2"')}), "spots", "says section t2"),
    "json is not": (lambda m: m.update({"000000000.json": b"{"}), "spots", "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_shard_and_key(copy: Path, name: str):
    change, what, message = FAULTS[name]
    rewrite(first_shard(copy), change)
    shards = ShardSet(copy)
    with pytest.raises(ShardError, match=rf"t1-0000\.tar.*(000000000).*{message}"):
        shards.spots if what == "spots" else getattr(shards, what)([0])
    report = verify(copy)
    assert not report.ok
    assert any("t1-0000.tar" in p for p in report.problems)


def test_one_flipped_bit_anywhere_is_found(copy: Path):
    path = first_shard(copy)
    data = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(0, len(data), 12):
        changed = data.copy()
        changed[place] ^= 0x10
        path.write_bytes(changed)
        assert not verify(copy).ok


def test_truncated_and_vanished_shards(copy: Path):
    path = first_shard(copy)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ShardError, match=r"t1-0000\.tar"):
        ShardSet(copy).tiles([48])
    assert not verify(copy).ok
    path.unlink()
    with pytest.raises(ShardError, match="the shard is gone"):
        ShardSet(copy).tiles([0])
    assert "is gone" in verify(copy).text


@pytest.mark.parametrize("kind", ["link", "path", "twice"])
def test_hostile_tars_are_refused(copy: Path, kind: str):
    path = first_shard(copy)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo({"link": "000000099.jpg", "path": "../../evil.jpg", "twice": "000000000.jpg"}[kind])
        if kind == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info, io.BytesIO(b""))
    with pytest.raises(ShardError, match=r"no plain file|twice"):
        ShardSet(copy).tiles([0])


def change_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "format version 2"),
        (lambda m: m.update(format="zip"), "not the manifest"),
        (lambda m: m.pop("n_genes"), "n_genes"),
        (lambda m: m.update(n_spots=7), "n_spots says 7"),
        (lambda m: m["shards"][0].update(file="../../etc/passwd"), "leaves the folder"),
        (lambda m: m["shards"][0].update(file="/etc/passwd"), "leaves the folder"),
        (lambda m: m["tile"].update(codec="pickle"), "not understood"),
        (lambda m: m["sections"][0].update(surprise=1), "surprise"),
    ],
)
def test_manifests_that_do_not_hold_together(copy: Path, change: Callable[[dict], None], message: str):
    change_manifest(copy, change)
    with pytest.raises(ShardError, match=message):
        ShardSet(copy)


def test_another_gene_table_is_refused(copy: Path):
    with (copy / "genes.tsv").open("a") as file:
        file.write("human:X\thuman\tX\t\t\n")
    with pytest.raises(ShardError, match=r"genes\.tsv"):
        ShardSet(copy).genes  # noqa: B018
    assert "genes.tsv" in verify(copy).text


def test_expr_round_trip_and_its_bytes():
    rows, counts = np.array([0, 5, 70000]), np.array([1, 2**31 - 1, 3])
    data = encode_expr(rows, counts)
    assert data[:8] == b"CTX1" + struct.pack("<I", 3)
    got = decode_expr(data, 70001, "here")
    np.testing.assert_array_equal(got[0], rows)
    np.testing.assert_array_equal(got[1], counts)
    assert decode_expr(encode_expr(np.array([]), np.array([])), 5, "here")[0].size == 0


# -- order ------------------------------------------------------------------------------------------------------

SECTION = np.repeat([0, 1, 2, 3], [50, 7, 120, 33])


@pytest.mark.parametrize("k", [None, 1, 2, 3])
@pytest.mark.parametrize("batch", [16, 64, 500])
def test_every_spot_once_per_epoch(k: int | None, batch: int):
    spots = np.arange(SECTION.size) * 3 + 1
    batches = epoch_batches(SECTION, spots, batch, k, seed=5, epoch=2)
    assert sorted(np.concatenate(batches).tolist()) == spots.tolist()
    assert all(2 <= b.size <= batch + 1 for b in batches)


def test_order_is_a_function_of_seed_and_epoch():
    spots = np.arange(SECTION.size)

    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_batches(SECTION, spots, 32, 2, seed, epoch)).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_batches_come_from_few_sections():
    section = np.repeat(np.arange(8), 64)
    batches = epoch_batches(section, np.arange(512), 64, 2, seed=0, epoch=0)
    assert len(batches) == 8
    assert {np.unique(section[b]).size for b in batches[:-2]} == {2}
    mixed = epoch_batches(section, np.arange(512), 64, None, seed=0, epoch=0)
    assert min(np.unique(section[b]).size for b in mixed) > 4
