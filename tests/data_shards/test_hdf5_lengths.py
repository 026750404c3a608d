"""Elements of variable length that claim more bytes than the file has are refused before the HDF5 library allocates them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from comtip_shards import SourceError
from comtip_shards.sources.hdf5 import lengths
from comtip_shards.sources.hdf5.lengths import check_lengths
from comtip_shards.sources.hdf5.opening import open_hdf5

TEXT = h5py.string_dtype()
WORDS = np.array(["a", "bbb", "cc"] * 50, object)
CLAIM = struct.pack("<I", 3 << 30)


def contiguous(file: h5py.File) -> None:
    file.create_dataset("d", data=WORDS, dtype=TEXT)


def arrays(file: h5py.File) -> None:
    file.create_dataset("d", data=np.array([np.arange(3), np.arange(5)], object), dtype=h5py.vlen_dtype(np.int64))


def compound(file: h5py.File) -> None:
    file.create_dataset("d", data=np.array([(1, "x"), (2, "yy")], np.dtype([("n", np.float64), ("s", TEXT)])))


def scalar(file: h5py.File) -> None:
    file.create_dataset("d", data="word", dtype=TEXT)


def chunked(**filters: object) -> Callable[[h5py.File], None]:
    return lambda file: file.create_dataset("d", data=WORDS, dtype=TEXT, chunks=(64,), **filters)


def damage(path: Path, at: int) -> None:
    """Replace the length in the reference at byte ``at`` of the stored elements."""
    with h5py.File(path, "r+") as file:
        data = file["d"]
        offset = data.id.get_offset()
        if offset is None:
            where = data.id.get_chunk_info(1).chunk_offset
            _, raw = data.id.read_direct_chunk(where)
            plain = bytearray(zlib.decompress(raw) if data.compression else raw)
            if data.shuffle:
                plain = bytearray(np.frombuffer(plain, np.uint8).reshape(16, -1).T.tobytes())
            plain[at : at + 4] = CLAIM
            shuffled = (
                np.frombuffer(bytes(plain), np.uint8).reshape(-1, 16).T.tobytes() if data.shuffle else bytes(plain)
            )
            data.id.write_direct_chunk(where, zlib.compress(shuffled) if data.compression else shuffled)
    if offset is not None:
        with path.open("r+b") as raw_file:
            raw_file.seek(offset + at)
            raw_file.write(CLAIM)


CASES = {
    "contiguous": (contiguous, 16),
    "scalar": (scalar, 0),
    "arrays": (arrays, 16),
    "compound": (compound, 32),
    "chunks": (chunked(), 16),
    "gzip": (chunked(compression="gzip"), 32),
    "shuffle and gzip": (chunked(compression="gzip", shuffle=True), 48),
}


@pytest.mark.parametrize("name", CASES)
def test_an_element_longer_than_its_file_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    path, (write, at) = tmp_path / "a.h5", CASES[name]
    with h5py.File(path, "w") as file:
        write(file)
    with h5py.File(path) as file:
        check_lengths(file["d"], "/d", path)
    damage(path, at)
    message = r"a\.h5: '/d' claims an element of [\d,]+ bytes, but the file has [\d,]+; copy"
    with h5py.File(path) as file, pytest.raises(SourceError, match=message):
        check_lengths(file["d"], "/d", path)
    with pytest.raises(SourceError, match=r"a\.h5: (damaged|'/d' claims)"):
        open_hdf5(path, "a file", "copy it again")
    monkeypatch.setattr(lengths, "_BLOCK", 16)  # references are read in several pieces
    with h5py.File(path) as file, pytest.raises(SourceError, match=message):
        check_lengths(file["d"], "/d", path)


PADDED = np.dtype([("n", "i1"), ("s", TEXT)], align=True)
ARRAYS = np.dtype([("n", "i4"), ("a", TEXT, (2,)), ("s", TEXT)])


@pytest.mark.parametrize("filters", [{}, {"chunks": (7,)}, {"chunks": (7,), "compression": "gzip", "shuffle": True}])
@pytest.mark.parametrize("kind", [PADDED, ARRAYS], ids=["padding", "arrays"])
def test_references_between_other_members_are_found(tmp_path: Path, kind: np.dtype, filters: dict[str, object]):
    """Negative numbers next to them, read as lengths, would be gigabytes."""
    path = tmp_path / "a.h5"
    row = (-5, "x" * 40) if kind is PADDED else (-5, ["ab", "cd"], "x" * 40)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("d", (20,), kind, **filters)
        data[:] = np.array([row] * 20, kind)
    with h5py.File(path) as file:
        check_lengths(file["d"], "/d", path)
        start = file["d"].id.get_offset() or file["d"].id.get_chunk_info(0).byte_offset
    raw = path.read_bytes()
    if "compression" not in filters:
        stored = raw.index(struct.pack("<I", 40), start)
        path.write_bytes(raw[:stored] + CLAIM + raw[stored + 4 :])
        with h5py.File(path) as file, pytest.raises(SourceError, match="claims an element"):
            check_lengths(file["d"], "/d", path)


def test_the_time_of_many_chunks_is_not_quadratic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("d", data=WORDS, dtype=TEXT, chunks=(1,))
    asked: list[int] = []
    plain = h5py.h5d.DatasetID
    with h5py.File(path) as file:
        data = file["d"]
        counting = SimpleNamespace(
            **{name: getattr(data.id, name) for name in dir(plain) if not name.startswith("_")}
            | {"get_chunk_info": lambda *args: asked.append(1)}
        )
        wrapped = SimpleNamespace(id=counting, file=file, size=data.size, chunks=data.chunks)
        check_lengths(wrapped, "/d", path)
    assert not asked
