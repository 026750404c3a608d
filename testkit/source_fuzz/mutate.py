"""Random mutations of one file: of its bytes, or of the structure of HDF5, JSON, tables, Parquet and TIFF."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from testkit.fuzz import BYTES

Generator = np.random.Generator
VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 1e300, 1e-300, -0.5, float("nan"), float("inf"), float("-inf"), "", "x",
    "../../x", "\0", "é\u202e", "=1+1", "1e5", "nan", "TRUE", "A" * 5000, [], {}, [[[]]], ["a"], {"a": 1}, "2-Sep", "0x10", "1,5",
]  # fmt: skip
"""Values of unexpected type, sign, size or encoding."""
NOT_DATA = [
    b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", b"<!DOCTYPE html><html></html>", bytes(5000),
    b"PK\x03\x04" + bytes(100), b"\x1f\x8b" + bytes(50), b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    b"\xff\xfe\x00\x00", b"\x89HDF\r\n\x1a\n", b"PAR1", b"II*\0", b"{", b"[" * 20_000, b'"' * 5000, b",\n" * 5000,
]  # fmt: skip
"""Contents of failed downloads, other formats and headers without a body."""


def pick(rng: Generator, values: list[Any]) -> Any:
    """Return a random one of the values."""
    return values[int(rng.integers(len(values)))]


def mutate(path: Path, others: list[Path], rng: Generator) -> str:
    """Apply one random mutation to a file in place and return its description; ``others`` may replace it."""
    chance = rng.random()
    if chance < 0.06:
        return _replace(path, others, rng)
    structured = _structured(path)
    if structured is not None and chance < 0.6:
        try:
            return structured(path, rng)
        except Exception as error:  # the library cannot write this mutation: mutate bytes instead
            note = type(error).__name__
        else:
            note = ""
    else:
        note = ""
    name = pick(rng, list(BYTES))
    path.write_bytes(BYTES[name](rng, path.read_bytes()))
    return f"{name}{' after ' + note if note else ''}"


def _structured(path: Path) -> Callable[[Path, Generator], str] | None:
    head = path.open("rb").read(4)
    if head == b"\x89HDF":
        return hdf5
    if head == b"PAR1":
        return parquet
    if head in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return tiff
    name = path.name.removesuffix(".gz")
    if name.endswith((".json", ".xenium", ".geojson")):
        return json_value
    return table if name.endswith((".csv", ".tsv", ".mtx")) else None


REPLACEMENTS = ("deleted", "not data", "other file", "folder", "pipe", "endless", "sparse", "link to nothing")
"""What a whole file can be replaced by."""


def _replace(path: Path, others: list[Path], rng: Generator) -> str:
    """Replace the whole file by one of ``REPLACEMENTS``; return which."""
    return replaced(path, pick(rng, list(REPLACEMENTS)), others, rng)


def replaced(path: Path, kind: str, others: list[Path], rng: Generator) -> str:
    """Replace the whole file by other content, a folder, a pipe or a link, or delete it; return the kind."""
    data = path.read_bytes() if kind != "other file" else pick(rng, others).read_bytes()
    path.unlink()
    if kind == "not data":
        path.write_bytes(pick(rng, NOT_DATA))
    elif kind == "other file":
        path.write_bytes(data)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        with path.open("wb") as file:
            file.write(data[:200])
            file.truncate(1 << 40)
    elif kind == "link to nothing":
        path.symlink_to("/nowhere/at/all")
    return kind


# -- HDF5 ------------------------------------------------------------------------------------------------------------


def hdf5(path: Path, rng: Generator) -> str:
    """Change one object or attribute of an HDF5 file; return the change."""
    # In a copy: the library may fail to close a damaged file and write to it later.
    scratch = path.parents[1] / "mutated.h5"
    scratch.write_bytes(path.read_bytes())
    with h5py.File(scratch, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = pick(rng, names)
        operation = pick(rng, [_h5_attribute, _h5_values, _h5_shape, _h5_delete, _h5_kind, _h5_values, _h5_claim])
        what = operation(file, name, rng)
    path.write_bytes(scratch.read_bytes())
    return f"{name}: {what}"


def _h5_attribute(file: h5py.File, name: str, rng: Generator) -> str:
    attrs = file[name].attrs
    if not len(attrs):
        return _h5_delete(file, name, rng)
    key = pick(rng, list(attrs))
    if rng.random() < 0.3:
        del attrs[key]
        return f"@{key} deleted"
    value = pick(rng, [v for v in VALUES if not isinstance(v, (dict, list)) and v is not None and v != "\0"])
    value = float(value) if isinstance(value, int) and abs(value) > 2**62 else value
    attrs[key] = value if rng.random() < 0.8 else [value, value]
    return f"@{key} = {str(value)[:20]!r}"


def _h5_delete(file: h5py.File, name: str, rng: Generator) -> str:
    del file[name]
    return "deleted"


def _h5_write(file: h5py.File, name: str, values: Any) -> None:
    attrs = dict(file[name].attrs)
    del file[name]
    if isinstance(values, np.ndarray) and values.dtype.kind in "UO":
        file.create_dataset(name, values.shape, h5py.string_dtype(), values.astype(object))
    else:
        file[name] = values
    file[name].attrs.update(attrs)


def _h5_values(file: h5py.File, name: str, rng: Generator) -> str:
    """Change values of a dataset, or its type; return the change."""
    node = file[name]
    if not isinstance(node, h5py.Dataset):
        return _h5_attribute(file, name, rng)
    old = np.asarray(node[()])
    if old.dtype.kind == "O":
        old = np.array([v.decode() if isinstance(v, bytes) else str(v) for v in old.ravel()]).reshape(old.shape)
    flat = old.ravel().copy()
    kind = pick(rng, ["one", "some", "type", "reverse", "same"])
    if kind == "type":
        dtype = pick(rng, ["f8", "i1", "u8", "bool", "U", "c16", "S4", "f2"])
        _h5_write(file, name, old.astype(dtype) if old.dtype.kind in "fiub" else np.zeros(old.shape, "f4"))
        return f"type {dtype}"
    if kind == "reverse":
        _h5_write(file, name, old[::-1] if old.ndim else old)
        return "reversed"
    if kind == "same":
        _h5_write(file, name, np.full(old.shape, flat[0] if flat.size else 0))
        return "all the same"
    value = pick(rng, [0, -1, 2**31 - 1, 1e300, np.nan, np.inf, 0.5, 255, 1_000_000])
    many = 1 if kind == "one" else max(1, flat.size // 3)
    rows = rng.integers(0, max(1, flat.size), many)
    if flat.dtype.kind in "US":
        flat = flat.astype(object)
        flat[rows] = pick(rng, ["", "x", "é", "A" * 3000, "../x", "2-Sep", "nan"])
        flat = flat.astype("U")
    else:
        with np.errstate(all="ignore"):
            flat = flat.astype(np.float64) if isinstance(value, float) and rng.random() < 0.5 else flat
            flat[rows] = np.array(value).astype(flat.dtype)
    _h5_write(file, name, flat.reshape(old.shape))
    return f"{kind} = {value}"


def _h5_shape(file: h5py.File, name: str, rng: Generator) -> str:
    node = file[name]
    if not isinstance(node, h5py.Dataset):
        return _h5_delete(file, name, rng)
    old = np.asarray(node[()])
    if old.dtype.kind == "O":
        old = old.astype("S")
    kind = pick(rng, ["cut", "empty", "flat", "axis", "scalar", "null", "longer", "transposed"])
    new: Any = {
        "cut": lambda: old[: len(old) // 2] if old.ndim else old,
        "empty": lambda: old[:0] if old.ndim else np.zeros(0, old.dtype),
        "flat": old.ravel,
        "axis": lambda: old[None],
        "scalar": lambda: old.ravel()[0],
        "null": lambda: h5py.Empty(old.dtype),
        "longer": lambda: np.concatenate([old, old]) if old.ndim else old,
        "transposed": lambda: old.T,
    }[kind]()
    _h5_write(file, name, new)
    return kind


def _h5_kind(file: h5py.File, name: str, rng: Generator) -> str:
    """Replace a dataset by a group, a group by a dataset, or an object by a copy of another; return the change."""
    if rng.random() < 0.5:
        names: list[str] = []
        file.visit(names.append)
        other = pick(rng, [n for n in names if not n.startswith(name) and not name.startswith(n)] or [name])
        if other != name:
            del file[name]
            file.copy(file[other], name)
        return f"replaced by {other}"
    was_group = isinstance(file[name], h5py.Group)
    attrs = dict(file[name].attrs)
    del file[name]
    if was_group:
        file[name] = np.arange(3)
    else:
        file.create_group(name)
    file[name].attrs.update(attrs)
    return "dataset" if was_group else "group"


def _h5_claim(file: h5py.File, name: str, rng: Generator) -> str:
    """Replace a dataset by an empty one that claims many times its rows; return the change."""
    node = file[name]
    if not isinstance(node, h5py.Dataset) or not node.ndim or node.dtype.kind == "O":
        return _h5_values(file, name, rng)
    shape, dtype, attrs = node.shape, node.dtype, dict(node.attrs)
    factor = int(pick(rng, [2, 1000, 10**6, 10**9]))
    del file[name]
    large = (shape[0] * factor, *shape[1:])
    file.create_dataset(name, large, dtype, chunks=tuple(min(64, max(1, n)) for n in large), compression="gzip")
    file[name].attrs.update(attrs)
    return f"claims {factor} times its rows"


# -- JSON, tables, parquet ----------------------------------------------------------------------------------------------


def _unpacked(path: Path) -> tuple[bytes, Callable[[bytes], bytes]]:
    raw = path.read_bytes()
    return (gzip.decompress(raw), gzip.compress) if raw[:2] == b"\x1f\x8b" else (raw, lambda data: data)


def json_value(path: Path, rng: Generator) -> str:
    """Change, delete or wrap one value of a JSON file, or its top level; return the change."""
    raw, pack = _unpacked(path)
    data = json.loads(raw)
    what, node = "", data
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = pick(rng, keys)
        what += f".{key}"
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    kind = pick(rng, ["value", "value", "delete", "wrap", "text", "top"])
    if kind == "value":
        node[key] = pick(rng, VALUES)
    elif kind == "delete":
        del node[key]
    elif kind == "wrap":
        node[key] = [node[key]]
    elif kind == "text":
        node[key] = json.dumps(node[key])
    else:
        data = pick(rng, [[], {}, [data], None, 1, "x", {"a": data}])
    path.write_bytes(pack(json.dumps(data).encode(pick(rng, ["utf-8", "utf-8", "utf-16", "utf-8-sig"]))))
    return f"{what} {kind}"


def table(path: Path, rng: Generator) -> str:
    """Change one cell, row or column of a table, or its dialect or encoding; return the change."""
    raw, pack = _unpacked(path)
    lines = raw.decode().split("\n")
    sep = "," if path.name.removesuffix(".gz").endswith(".csv") else "\t" if "\t" in lines[0] else " "
    row = int(rng.integers(max(1, len(lines) - 1))) if rng.random() < 0.7 else 0
    cells = lines[row].split(sep)
    column = int(rng.integers(len(cells)))
    kind = pick(
        rng,
        [
            "cell",
            "cell",
            "cell",
            "no header",
            "drop column",
            "twice",
            "dialect",
            "swap",
            "ragged",
            "encoding",
            "header only",
        ],
    )
    if kind == "cell":
        value = str(pick(rng, VALUES))
        cells[column] = value
        lines[row] = sep.join(cells)
        kind = f"row {row}, column {column} = {value[:20]!r}"
    elif kind == "no header":
        lines = lines[1:]
    elif kind == "drop column":
        lines = [sep.join(c for i, c in enumerate(line.split(sep)) if i != column) for line in lines]
    elif kind == "twice":
        lines.insert(row, lines[row])
    elif kind == "dialect":
        lines = [line.replace(sep, pick(rng, [";", "\t", ",", " ", "|"])) for line in lines]
    elif kind == "swap":
        other = int(rng.integers(len(cells)))
        split = [line.split(sep) for line in lines]
        for line in split:
            if len(line) > max(column, other):
                line[column], line[other] = line[other], line[column]
        lines = [sep.join(line) for line in split]
    elif kind == "ragged":
        lines[row] += sep + sep.join(["1"] * int(rng.integers(1, 4)))
    elif kind == "header only":
        lines = lines[:1]
    text = "\n".join(lines)
    encoded = (
        text.encode(pick(rng, ["utf-16", "utf-8-sig", "latin-1"]), "replace") if kind == "encoding" else text.encode()
    )
    path.write_bytes(pack(encoded))
    return kind


def parquet(path: Path, rng: Generator) -> str:
    """Replace, drop, rename or append one column of a Parquet file, or remove or repeat its rows; return the change."""
    data = pq.read_table(path)
    column, n = int(rng.integers(data.num_columns)), data.num_rows
    name = data.column_names[column]
    kind = pick(rng, ["values", "values", "drop", "rename", "no rows", "twice", "index"])
    if kind == "values":
        values = pick(
            rng,
            [pa.nulls(n), pa.array(["x"] * n), pa.array([-1.5] * n), pa.array([2**40] * n), pa.array([[1]] * n),
             pa.array([float("nan")] * n), pa.array([1e300] * n), pa.array([b"\xff"] * n), pa.array([True] * n),
             pa.array([{"a": 1}] * n), pa.array(["A" * 2000] * n), pa.array([None, *[1.0] * (n - 1)])],
        )  # fmt: skip
        data = data.set_column(column, name, values)
        kind = f"{values.type}"
    elif kind == "drop":
        data = data.drop_columns([name])
    elif kind == "rename":
        data = data.rename_columns(
            [pick(rng, ["x", "", name.upper(), name + " "]) if c == name else c for c in data.column_names]
        )
    elif kind == "no rows":
        data = data.slice(0, 0)
    elif kind == "twice":
        data = pa.concat_tables([data, data])
    else:
        data = data.append_column("__index_level_0__", pa.array(range(n)))
    out = io.BytesIO()
    pq.write_table(data, out)
    path.write_bytes(out.getvalue())
    return f"{name}: {kind}"


# -- TIFF ------------------------------------------------------------------------------------------------------------


def tiff(path: Path, rng: Generator) -> str:
    """Change the code, type, count or value of one tag in a random directory of a TIFF; return the change."""
    data = bytearray(path.read_bytes())
    order = "<" if data[:2] == b"II" else ">"
    big = data[2 if order == "<" else 3] == 43
    head, entry = (f"{order}Q", f"{order}HHQQ") if big else (f"{order}H", f"{order}HHII")
    (offset,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
    directories = []
    while offset and offset < len(data) and len(directories) < 8:
        (count,) = struct.unpack_from(head, data, offset)
        directories.append((offset + struct.calcsize(head), count))
        (offset,) = struct.unpack_from(
            f"{order}{'Q' if big else 'I'}", data, directories[-1][0] + count * struct.calcsize(entry)
        )
    start, count = pick(rng, directories)
    at = start + int(rng.integers(count)) * struct.calcsize(entry)
    tag, kind, n, value = struct.unpack_from(entry, data, at)
    part = pick(rng, ["code", "type", "count", "value", "value", "value"])
    top = 2 ** (64 if big else 32) - 1
    if part == "code":
        tag = int(
            pick(rng, [254, 256, 257, 258, 259, 262, 270, 274, 277, 282, 296, 317, 320, 322, 324, 330, 338, 339, 65000])
        )
    elif part == "type":
        kind = int(pick(rng, [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 99]))
    elif part == "count":
        n = int(pick(rng, [0, 1, 2, 1000, 2**31 - 1, top]))
    else:
        value = int(
            pick(rng, [0, 1, 2, 3, 5, 6, 7, 8, 16, 32, 64, 255, 1000, 65535, 10**6, 2**31 - 1, top, len(data) - 4])
        )
    struct.pack_into(entry, data, at, tag, kind, n, value)
    path.write_bytes(bytes(data))
    return f"tag {tag}: {part}"
