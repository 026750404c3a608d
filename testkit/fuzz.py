"""Random mutations of a shard set, to test the reader and ``verify``.

There are two kinds of mutation. *Damage* changes files only: ``verify`` must detect every changed data byte, and the
reader must return the original data or raise ShardError. A *forgery* also updates every hash to match: different data may then
be returned, but nothing may crash, hang or use unbounded memory.

``python -m testkit.fuzz --seed N --count 10000`` mutates sources instead of sets, see :mod:`testkit.source_fuzz.run`.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from comtip_shards.errors import ShardError
from comtip_shards.format import spot_table as spots
from comtip_shards.format.manifest import NAME, read_manifest, sha256_of
from comtip_shards.reader.shard_set import ShardSet
from comtip_shards.reader.verify import verify

from testkit.shards import change_manifest, read_tar, reseal, rewrite, seal_files

Generator = np.random.Generator


@dataclass(frozen=True)
class Outcome:
    """A mutation and its effect."""

    what: str
    """File and operation."""
    found: bool
    """Whether ``verify`` reported damage, or the set could not be opened."""
    harmless: bool
    """Whether no data changed: the bytes are the same, or the manifest parses to the same JSON."""
    refused: int
    """Number of reads that raised ShardError."""
    wrong: tuple[str, ...]
    """Names of reads that returned different data without an error; empty for a forgery."""


class Fuzzer:
    """Mutates a copy of one small shard set.

    Parameters
    ----------
    source
        An intact set; it is not modified.
    work
        Folder for the copy; it must not exist.
    """

    def __init__(self, source: Path, work: Path) -> None:
        self.work = work
        self.files = {p.relative_to(source): p.read_bytes() for p in source.rglob("*") if p.is_file()}
        named = read_manifest(source)
        listed = {NAME, named.genes_file, named.spots_file, *(s.overview.file for s in named.sections)}
        listed |= {f for s in named.shards for f in (s.file, s.index)}
        self.names = sorted(p for p in self.files if p.as_posix() in listed)
        shutil.copytree(source, work)
        self.truth = _read_all(ShardSet(source))

    def run(self, rng: Generator, *, forge: bool) -> Outcome:
        """Apply one random mutation, a forgery or damage, evaluate it, and restore the set.

        Raises
        ------
        Exception
            The reader or ``verify`` raised something other than ShardError, which is a bug.
        """
        what = self._forge(rng) if forge else self._damage(rng)
        try:
            return self._evaluate(what, forge)
        finally:
            self._restore()

    # -- evaluation ------------------------------------------------------------------------------------------

    def _evaluate(self, what: str, forge: bool) -> Outcome:
        try:
            found = not verify(self.work).ok
        except ShardError:
            found = True
        try:
            got = _read_all(ShardSet(self.work))
        except ShardError:
            got = {}
        refused = sum(1 for name in self.truth if got.get(name) is None)
        wrong = () if forge else tuple(n for n, v in got.items() if v is not None and v != self.truth.get(n))
        return Outcome(what, found, self._is_same(), refused, wrong)

    def _is_same(self) -> bool:
        for name in self.names:
            path, before = self.work / name, self.files[name]
            now = path.read_bytes() if path.is_file() else None
            if now != before and not (name.name == NAME and _same_json(now, before)):
                return False
        return True

    def _restore(self) -> None:
        for name, before in self.files.items():
            path = self.work / name
            if not path.is_file() or path.read_bytes() != before:
                path.write_bytes(before)

    # -- damage -------------------------------------------------------------------------------------------

    def _damage(self, rng: Generator) -> str:
        name = self.names[rng.integers(len(self.names))]
        path = self.work / name
        operation, chance = list(BYTES)[rng.integers(len(BYTES))], rng.random()
        if chance < 0.9:
            path.write_bytes(BYTES[operation](rng, self.files[name]))
        elif chance < 0.95:
            operation = "deleted"
            path.unlink()
        else:
            other = self.names[rng.integers(len(self.names))]
            operation = f"replaced by {other}"
            path.write_bytes(self.files[other])
        return f"{name}: {operation}"

    # -- forgeries ----------------------------------------------------------------------------------------

    def _forge(self, rng: Generator) -> str:
        forge = FORGERIES[rng.integers(len(FORGERIES))]
        return f"forged: {forge(self, rng)}"

    def _forge_member(self, rng: Generator) -> str:
        manifest = read_manifest(self.work)
        shard = manifest.shards[rng.integers(len(manifest.shards))]
        path = self.work / shard.file
        name = list(read_tar(path))[rng.integers(3 * shard.records)]
        operation = list(BYTES)[rng.integers(len(BYTES))]
        rewrite(path, lambda m: m.update({name: BYTES[operation](rng, m[name])}))
        reseal(self.work, manifest)
        return f"{name}: {operation}"

    def _forge_table(self, rng: Generator) -> str:
        manifest = read_manifest(self.work)
        name = [manifest.genes_file, manifest.spots_file][rng.integers(2)]
        operation = list(BYTES)[rng.integers(len(BYTES))]
        (self.work / name).write_bytes(BYTES[operation](rng, (self.work / name).read_bytes()))
        seal_files(self.work)
        return f"{name}: {operation}"

    def _forge_column(self, rng: Generator) -> str:
        """Write a valid parquet file with one column replaced by other values."""
        path = self.work / spots.FILE
        table = pq.read_table(path)
        column = rng.integers(table.num_columns)
        values: list[Any] = [
            pa.nulls(table.num_rows),
            pa.array(["x" * 9000] * table.num_rows),
            pa.array([-1.5] * table.num_rows),
            pa.array([2**40] * table.num_rows),
            pa.array([[1]] * table.num_rows),
        ]
        table = table.set_column(int(column), table.column_names[column], values[rng.integers(len(values))])
        pq.write_table(table, path)
        seal_files(self.work)
        return f"{spots.FILE}: column {column}"

    def _forge_index(self, rng: Generator) -> str:
        manifest = read_manifest(self.work)
        number = rng.integers(len(manifest.shards))
        path = self.work / manifest.shards[number].index
        operation = list(BYTES)[rng.integers(len(BYTES))]
        path.write_bytes(BYTES[operation](rng, path.read_bytes()))
        _seal_index(self.work, int(number))
        return f"{path.name}: {operation}"

    def _forge_manifest(self, rng: Generator) -> str:
        """Replace one random value in the manifest, update the digest, and return the name of the value."""
        what = ""

        def change(data: dict[str, Any]) -> None:
            nonlocal what
            node: Any = data
            while True:
                keys = list(node) if isinstance(node, dict) else list(range(len(node)))
                key = keys[rng.integers(len(keys))]
                what += f".{key}"
                inner = node[key]
                if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.1:
                    break
                node = inner
            values: list[Any] = [None, -1, 0, 2**62, 1e300, "", "../../x", "\0", [], {}, True, [[[]]], "A" * 5000]
            node[key] = values[rng.integers(len(values))]

        change_manifest(self.work, change, seal=True)
        return f"{NAME}{what}"


FORGERIES: tuple[Callable[[Fuzzer, Generator], str], ...] = (
    Fuzzer._forge_member,
    Fuzzer._forge_table,
    Fuzzer._forge_column,
    Fuzzer._forge_index,
    Fuzzer._forge_manifest,
)


def _seal_index(folder: Path, number: int) -> None:
    def change(data: dict[str, Any]) -> None:
        shard = data["shards"][number]
        shard["index_sha256"] = sha256_of(folder / shard["index"])

    change_manifest(folder, change, seal=True)


def _same_json(now: bytes | None, before: bytes) -> bool:
    try:
        return now is not None and bool(json.loads(now) == json.loads(before))
    except (ValueError, RecursionError):
        return False


def _read_all(shards: ShardSet) -> dict[str, bytes | None]:
    """Return {name: bytes} of what the reader returns (of at most 1,000 spots), None for reads that raise ShardError."""
    reads: dict[str, Callable[[], bytes]] = {
        "genes": lambda: repr(shards.genes).encode(),
        "spots": lambda: shards.spots.to_csv().encode(),
    }
    for number in range(len(shards.manifest.sections)):
        reads[f"overview {number}"] = lambda n=number: shards.overview(n)[0].tobytes()  # type: ignore[misc]
        reads[f"measured {number}"] = lambda n=number: shards.measured(n).tobytes()  # type: ignore[misc]
    for spot in range(min(len(shards), 1000)):
        reads[f"tile {spot}"] = lambda s=spot: shards.tiles([s]).tobytes()  # type: ignore[misc]
        reads[f"counts {spot}"] = lambda s=spot: _csr_bytes(shards, s)  # type: ignore[misc]
        reads[f"json {spot}"] = lambda s=spot: shards.members([s], "json")[0]  # type: ignore[misc]
    out: dict[str, bytes | None] = {}
    for name, read in reads.items():
        try:
            out[name] = read()
        except ShardError:
            out[name] = None
    return out


def _csr_bytes(shards: ShardSet, spot: int) -> bytes:
    counts = shards.counts([spot])
    file = io.BytesIO()
    for part in (counts.indices, counts.data):
        file.write(part.tobytes())
    return file.getvalue()


# -- byte mutations ----------------------------------------------------------------------------------------


def _span(rng: Generator, data: bytes, most: int = 64) -> tuple[int, int]:
    start = int(rng.integers(max(1, len(data))))
    return start, min(len(data), start + int(rng.integers(1, most)))


def _flip_bit(rng: Generator, data: bytes) -> bytes:
    out = bytearray(data)
    if out:
        out[rng.integers(len(out))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def _set_bytes(rng: Generator, data: bytes) -> bytes:
    start, stop = _span(rng, data)
    return data[:start] + rng.bytes(stop - start) + data[stop:]


def _zero(rng: Generator, data: bytes) -> bytes:
    start, stop = _span(rng, data, 2000)
    return data[:start] + b"\0" * (stop - start) + data[stop:]


def _remove(rng: Generator, data: bytes) -> bytes:
    start, stop = _span(rng, data)
    return data[:start] + data[stop:]


def _insert(rng: Generator, data: bytes) -> bytes:
    start, stop = _span(rng, data)
    return data[:start] + rng.bytes(stop - start) + data[start:]


def _repeat(rng: Generator, data: bytes) -> bytes:
    start, stop = _span(rng, data, 2000)
    return data[:stop] + data[start:stop] + data[stop:]


def _cut(rng: Generator, data: bytes) -> bytes:
    return data[: int(rng.integers(max(1, len(data))))]


def _append(rng: Generator, data: bytes) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 2000)))


def _change_digit(rng: Generator, data: bytes) -> bytes:
    """Replace one digit by a random one, so that numbers in text tables remain numbers."""
    digits = [i for i, b in enumerate(data) if 48 <= b <= 57]
    if not digits:
        return _flip_bit(rng, data)
    index = digits[rng.integers(len(digits))]
    return data[:index] + bytes([48 + int(rng.integers(10))]) + data[index + 1 :]


BYTES: dict[str, Callable[[Generator, bytes], bytes]] = {
    "bit flipped": _flip_bit,
    "bytes set": _set_bytes,
    "zeroed": _zero,
    "removed": _remove,
    "inserted": _insert,
    "repeated": _repeat,
    "cut": _cut,
    "appended": _append,
    "digit changed": _change_digit,
}


if __name__ == "__main__":
    from testkit.source_fuzz.run import main

    raise SystemExit(main())
