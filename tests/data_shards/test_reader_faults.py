"""A damaged set is never read as an intact one: each error names the shard, and verify detects it."""

import io
import itertools
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from comtip_shards import ShardError, ShardSet
from comtip_shards.format.manifest import read_manifest
from comtip_shards.format.record import decode_expr, decode_exprs, encode_expr
from comtip_shards.reader.verify import verify
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from testkit.shards import change_manifest, reseal, rewrite, seal_files


@pytest.fixture
def copy(tiny_shards: ShardSet, tmp_path: Path) -> Path:
    shutil.copytree(tiny_shards.path, tmp_path / "set")
    return tmp_path / "set"


def first_shard(folder: Path) -> Path:
    return folder / ShardSet(folder).manifest.shards[0].file


def picture(size: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size)).save(out, "JPEG")
    return out.getvalue()


def test_a_whole_set_verifies(tiny_shards: ShardSet):
    report = verify(tiny_shards.path)
    assert report.ok, report.text
    assert report.records == len(tiny_shards)
    assert report.counts == int(tiny_shards.counts(range(len(tiny_shards))).sum())


KEY = "000000000"
DAMAGE = {
    "tile of another size": lambda m: m.update({f"{KEY}.jpg": picture(48)}),
    "tile cut short": lambda m: m.update({f"{KEY}.jpg": m[f"{KEY}.jpg"][:200]}),
    "tile gone": lambda m: m.pop(f"{KEY}.jpg"),
    "counts gone": lambda m: m.pop(f"{KEY}.expr"),
    "one count changed": lambda m: m.update({f"{KEY}.expr": m[f"{KEY}.expr"][:-1] + b"\7"}),
    "tiles exchanged": lambda m: m.update({f"{KEY}.jpg": m["000000001.jpg"], "000000001.jpg": m[f"{KEY}.jpg"]}),
    "json of another section": lambda m: m.update({f"{KEY}.json": m[f"{KEY}.json"].replace(b'"t1"', b'"t2"')}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_names_shard_and_key(copy: Path, name: str):
    rewrite(first_shard(copy), DAMAGE[name])
    part = "expr" if "count" in name else "json" if "json" in name else "tile"
    with pytest.raises(
        ShardError, match=rf"t1-0000\.tar: record {KEY}: the member \.\w+ (does not match|extends beyond)"
    ) as error:
        ShardSet(copy).members([0], part)
    assert error.value.kind in {"checksum", "truncated"}
    report = verify(copy)
    assert not report.ok
    assert any("t1-0000.tar" in p for p in report.problems)


def expr(rows: list[int], counts: list[int]) -> bytes:
    return encode_expr(np.array(rows), np.array(counts))


FORGED = {
    "tile of another size": ("jpg", lambda d: picture(48), "48 x 48 px"),
    "huge tile": ("jpg", lambda d: picture(2000), "2000 x 2000 px"),
    "tile is noise": ("jpg", lambda d: b"\xff\xd8nonsense", "cannot be decoded"),
    "tile cut short": ("jpg", lambda d: d[:200], "cannot be decoded"),
    "counts of another format": ("expr", lambda d: b"CTX1" + d[4:], "not a count record"),
    "counts too short": ("expr", lambda d: d[:11], "not a count record"),
    "counts cut short": ("expr", lambda d: d[:-4], "bytes for"),
    "more genes than there are bytes": ("expr", lambda d: d[:4] + b"\xff" * 12, "bytes for"),
    "gene out of range": ("expr", lambda d: expr([9999], [1]), "must be below"),
    "a gap that does not end": ("expr", lambda d: expr([2, 3], [1, 1])[:-3] + b"\xff\0\0", "the gaps do not match"),
    "a count of 2^31": ("expr", lambda d: expr([2], [2**31]), "counts above 255"),
    "a large count that is small": (
        "expr",
        lambda d: expr([2], [300]).replace(struct.pack("<I", 300), struct.pack("<I", 9)),
        "counts above",
    ),
    "json is not": ("json", lambda d: b"{", "not JSON"),
    "json too deep": ("json", lambda d: b"[" * 60_000, "not JSON"),
    "json of another section": ("json", lambda d: d.replace(b'"t1"', b'"t2"'), "section_id is t2"),
    "json of another spot": ("json", lambda d: d.replace(b'"x_px":', b'"x_px":1'), "x_px is"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_hashes_do_not_see_decoding_does(copy: Path, name: str):
    """A malicious set whose hashes all match."""
    extension, change, message = FORGED[name]
    rewrite(first_shard(copy), lambda m: m.update({f"{KEY}.{extension}": change(m[f"{KEY}.{extension}"])}))
    reseal(copy, read_manifest(copy))
    report = verify(copy)
    assert len(report.problems) == 1
    assert KEY in report.text
    assert message in report.text
    if extension != "json":
        with pytest.raises(ShardError, match=rf"t1-0000\.tar: record {KEY}.*{message}") as error:
            ShardSet(copy).tiles([0]) if extension == "jpg" else ShardSet(copy).counts([5, 0])
        assert error.value.kind == {"jpg": "tile", "expr": "counts"}[extension]


def test_one_flipped_bit_anywhere_is_found(copy: Path):
    path = first_shard(copy)
    data = bytearray(path.read_bytes())
    for offset in np.random.default_rng(0).integers(0, len(data), 12):
        changed = data.copy()
        changed[offset] ^= 0x10
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
    with pytest.raises(ShardError, match="the shard is missing"):
        ShardSet(copy).tiles([0])
    assert "is missing" in verify(copy).text


@pytest.mark.parametrize("kind", ["link", "path", "twice"])
def test_hostile_tars_are_not_touched_and_verify_reports_them(copy: Path, kind: str):
    path = first_shard(copy)
    before = ShardSet(copy).tiles(range(49))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo({"link": "000000099.jpg", "path": "../../evil.jpg", "twice": "000000000.jpg"}[kind])
        if kind == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info, io.BytesIO(b""))
    # The reader accesses only indexed and verified members.
    np.testing.assert_array_equal(ShardSet(copy).tiles(range(49)), before)
    text = verify(copy).text
    assert "not a regular file" in text or "duplicate member" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update(version=1),
            r"format version 1 is not supported \(expected 2\); build the set again from its sources, into a new folder",
        ),
        (lambda m: m.update(format="zip"), "not the manifest"),
        (lambda m: m.pop("n_genes"), "n_genes"),
        (lambda m: m.update(n_spots=7), "n_spots is 7"),
        (lambda m: m["shards"][0].update(file="../../etc/passwd"), "leaves the folder"),
        (lambda m: m["shards"][0].update(file="/etc/passwd"), "leaves the folder"),
        (lambda m: m["tile"].update(codec="pickle"), "are not supported"),
        (lambda m: m["shards"][0].update(index="../t1.idx"), "leaves the folder"),
        (lambda m: m["sections"][0].update(surprise=1), "surprise"),
        (lambda m: m["sections"][0].update(n_spots="49"), "n_spots"),
        (lambda m: m["sections"][0].update(mpp=None), "mpp"),
        (lambda m: m["sections"][0].update(assay_genes="AA=="), "assay_genes"),
        (lambda m: m["shards"][0].update(section_id="t2"), "not within its section"),
        (lambda m: m["shards"][0].update(bytes=49 * 1024), "more records than fit"),
        (lambda m: m["sections"][0].update(donor="someone else"), "edited by hand"),
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
    seal_files(copy)
    with pytest.raises(ShardError, match=r"genes\.tsv: 31 genes, but the manifest states 30; do not use this set"):
        ShardSet(copy).genes  # noqa: B018


def test_expr_round_trip_and_its_bytes():
    rows, counts = np.array([0, 5, 261, 517, 70000]), np.array([1, 2**31 - 1, 255, 256, 3])
    data = encode_expr(rows, counts)
    # 5 genes; gaps 0, 4, 255, 255 and 69482 = 272 * 255 + 122; two counts above 255.
    want = b"CTX2" + struct.pack("<5I", 5, 2 + 2 + 2 + 273, 2, 2**31 - 1, 256)
    want += bytes([0, 4, 255, 0, 255, 0]) + b"\xff" * 272 + bytes([122]) + bytes([0, 255, 254, 255, 2])
    assert data == want
    got = decode_expr(data, 70001, "here")
    np.testing.assert_array_equal(got[0], rows)
    np.testing.assert_array_equal(got[1], counts)
    assert decode_expr(encode_expr(np.array([]), np.array([])), 5, "here")[0].size == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 2999), st.integers(1, 2**31 - 1), max_size=40), max_size=5))
def test_many_records_decode_as_one_by_one(spots: list[dict[int, int]]):
    records = [encode_expr(np.array(sorted(s), int), np.array([s[r] for r in sorted(s)], int)) for s in spots]
    indptr, rows, counts = decode_exprs(records, 3000, str)
    assert indptr.tolist() == np.cumsum([0, *map(len, spots)]).tolist()
    got = [dict(zip(rows[a:b].tolist(), counts[a:b].tolist(), strict=True)) for a, b in itertools.pairwise(indptr)]
    assert got == spots
