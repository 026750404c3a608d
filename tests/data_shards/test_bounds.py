"""Sizes of what is read, unpacked or printed are bounded, and are checked before memory is allocated."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from comtip_shards import ShardError, ShardSet, SourceError
from comtip_shards.format.record import decode_tile
from comtip_shards.names import printable
from comtip_shards.reader.verify import verify
from comtip_shards.sources.hdf5.opening import open_hdf5
from comtip_shards.sources.tenx import matrix as tenx_matrix
from comtip_shards.sources.tenx.matrix import TenxMatrix
from comtip_shards.storage.regular_file import read_regular
from PIL import Image

from comtip_fast.cli import main
from comtip_fast.config.io import ConfigError, load_config
from comtip_fast.evaluation import figures
from testkit.shards import change_manifest, reseal, rewrite
from testkit.tenx import write_mex


@pytest.fixture
def copy(tiny_shards: ShardSet, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards.path, tmp_path / "set"))


def test_only_regular_files_are_read_whole(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    assert read_regular(path, 5) == read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(path, 4)
    with pytest.raises(OSError, match=r"symbolic links"):
        read_regular(tmp_path / "link", follow=False)
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError):
            read_regular(odd)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="more than"):
        read_regular(tmp_path / "sparse")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    "name", ["manifest.json", "genes.tsv", "spots.parquet", "overview/t1.jpg", "shards/t1-0000.idx"]
)
@pytest.mark.parametrize("damage", [pipe, zeros, sparse])
def test_files_that_never_end_do_not_hold_a_reader(copy: Path, name: str, damage: Callable[[Path], None]):
    damage(copy / name)
    began = time.monotonic()
    if name == "manifest.json":
        with pytest.raises(ShardError, match=r"manifest\.json"):
            verify(copy)
    else:
        assert not verify(copy).ok
    assert time.monotonic() - began < 60


def picture(mode: str, codec: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (8, 8)).save(out, codec.upper(), **options)
    return out.getvalue()


def png_of_16_bits() -> bytes:
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = (b"\0" + bytes(8 * 6)) * 8
    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "codec"),
    [
        (png_of_16_bits(), "png"),
        (picture("L", "png"), "png"),
        (picture("RGBA", "png"), "png"),
        (picture("P", "png"), "png"),
        (picture("L", "jpeg"), "jpeg"),
        (picture("CMYK", "jpeg"), "jpeg"),
        (picture("RGBA", "webp"), "webp"),
        (picture("RGB", "png", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]), "png"),
        (picture("RGB", "webp", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]), "webp"),
    ],
)
def test_a_tile_is_one_picture_of_3_times_8_bits(data: bytes, codec: str):
    with pytest.raises(ShardError, match="here: the tile is not a single RGB image of 8 bits"):
        decode_tile(data, 8, codec, "here")
    assert decode_tile(picture("RGB", codec), 8, codec, "here").shape == (8, 8, 3)


def test_a_tile_cannot_have_many_times_the_bytes_of_its_pixels(copy: Path):
    padded = lambda data: data[:2] + (b"\xff\xfe\xff\xff" + bytes(65533)) * 80 + data[2:]  # noqa: E731 (JPEG comments)
    rewrite(copy / "shards/t1-0000.tar", lambda m: m.update({"000000000.jpg": padded(m["000000000.jpg"])}))
    reseal(copy, ShardSet(copy).manifest)
    with pytest.raises(ShardError, match=r"t1-0000\.idx: a member has \d+ bytes, more than the tile"):
        ShardSet(copy).tiles([0])
    assert not verify(copy).ok


def test_a_dataset_that_claims_more_than_it_stores_is_not_read(tmp_path: Path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("uns/image", (200_000, 150_000, 3), "u1", chunks=(512, 512, 3), compression="gzip")
    with pytest.raises(SourceError, match=r"a\.h5: '/uns/image' claims 83\.8 GiB .*copy or download it again"):
        open_hdf5(tmp_path / "a.h5", "an HDF5 file", "download it again")
    with h5py.File(tmp_path / "b.h5", "w") as file:  # zeros that were written are data
        data = file.create_dataset("x", (1 << 22,), "f8", chunks=(1 << 20,), compression="gzip")
        data[:] = 0
        file["none"] = h5py.Empty("f4")
        file["text"] = np.array(["a", "b"], h5py.string_dtype())
    open_hdf5(tmp_path / "b.h5", "an HDF5 file", "download it again").close()


def test_packed_lists_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_mex(
        tmp_path / "m", np.ones((3, 4), int), [f"B{i}" for i in range(4)], ["ENSG1", "ENSG2", "ENSG3"], ["A", "B", "C"]
    )
    files = tuple(tmp_path / "m" / f"{n}.gz" for n in ("matrix.mtx", "features.tsv", "barcodes.tsv"))
    matrix = TenxMatrix(tmp_path / "m", files)
    assert len(matrix.features().ids) == 3
    monkeypatch.setattr(tenx_matrix, "MAX_TEXT_BYTES", 10**6)
    files[1].write_bytes(gzip.compress(b"x\n" * 10**7))
    with pytest.raises(SourceError, match=r"features\.tsv\.gz: more than 1,000,000 bytes after decompression"):
        matrix.features()


def test_aliases_of_a_config_are_bounded(tmp_path: Path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
    ]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    (tmp_path / "circle.yaml").write_text("data: &d {views: *d}")
    for name in ("bomb", "circle"):
        with pytest.raises(
            ConfigError,
            match=rf"{name}\.yaml: aliases \(\*name\) expand to more than 100,000 values; write .* without aliases$",
        ):
            load_config(tmp_path / f"{name}.yaml")
    (tmp_path / "good.yaml").write_text("optim: {lr: &rate 1.0e-3}\ntrain: {seed: 3}\n")
    assert load_config(tmp_path / "good.yaml").train.seed == 3


@pytest.mark.parametrize("name", ["$", "$\\frac{", "$x_$", "$" + "{" * 5000, "x" * 10**6, "a\nb" * 1000, "\\$", "_x"])
def test_names_in_figures_are_text_of_bounded_length(name: str):
    assert len(figures.plain(name)) <= 80  # before drawing: a text of a million characters takes gigabytes
    rng = np.random.default_rng(0)
    began = time.monotonic()
    assert figures.gene_histogram(rng.uniform(size=5), rng.uniform(size=(2, 5)), name).startswith("data:image/png")
    genes = [(name, np.arange(4.0), np.arange(4.0), 0.5)]
    xy = np.array([[10.0, 10], [10, 50], [50, 10], [50, 50]])
    assert figures.maps(np.zeros((64, 64, 3), np.uint8), 1.0, 1.0, xy, 5.0, genes).startswith("data:image/jpeg")
    assert time.monotonic() - began < 60


def test_a_terminal_gets_no_escapes_of_a_set(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    evil = "\x1b]0;owned\x07\x1b[2J\x9b1m\u202e\r"

    def change(data: dict) -> None:
        for section in data["sections"]:
            section["tissue"] += evil
            section["donor"] += evil
            section["source"]["notes"].append(evil)

    change_manifest(copy, change, seal=True)
    assert main(["shards", "merge", str(copy), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "\\x1b]0;owned" in out
    assert printable(out) == out
    assert main(["shards", "merge", str(copy), str(copy / evil), "--out", str(tmp_path / "out2")]) == 2
    err = capsys.readouterr().err
    assert printable(err) == err
    assert printable("a\nb\tc é") == "a\nb\tc é"
