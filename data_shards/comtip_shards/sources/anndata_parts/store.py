"""Lazy access to the elements of an AnnData: ``.h5ad``, ``.zarr``, or an object in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

from comtip_shards.errors import SourceError, install_extra
from comtip_shards.not_data import not_data
from comtip_shards.sources.files.opening import fix_of, reading
from comtip_shards.sources.files.packaging import find, unpacked
from comtip_shards.sources.files.zarr_metadata import check_store, head_text
from comtip_shards.sources.hdf5.opening import check_entries, open_hdf5

SUFFIXES = (".h5ad", ".h5ad.gz")
_PLUGIN_IDS = 256
"""HDF5 filters from this id on are plugins."""
_PLUGINS = {32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32013: "zfp", 32015: "zstd", 32026: "blosc2"}


class Store(Protocol):
    """Elements of an AnnData by their names in a file, e.g. ``obsm/spatial`` and ``raw/X``."""

    path: Path

    def __contains__(self, key: str) -> bool:
        """Return whether an element exists."""

    def __getitem__(self, key: str) -> Any:
        """Read one element."""

    def keys(self, group: str) -> list[str]:
        """Return the names in a group, empty if it does not exist."""

    def group(self, key: str) -> Any:
        """Return a group or mapping without reading its arrays; an empty mapping if it does not exist."""


class FileStore:
    """An open HDF5 file or zarr group."""

    def __init__(self, root: Any, path: Path) -> None:
        self._root, self.path = root, path

    def __contains__(self, key: str) -> bool:
        """Return whether an element exists."""
        try:
            return key in self._root
        except (KeyError, ValueError, TypeError):
            return False

    def __getitem__(self, key: str) -> Any:
        """Read one element."""
        return read_part(self._root, key, self.path)

    def keys(self, group: str) -> list[str]:
        """Return the names in a group, empty if it does not exist."""
        return list(self._root[group]) if group in self and hasattr(self._root[group], "keys") else []

    def group(self, key: str) -> Any:
        """Return a group without reading its arrays, {} if it does not exist."""
        return self._root[key] if key in self else {}


class MemoryStore:
    """An AnnData in memory."""

    def __init__(self, data: ad.AnnData, path: Path) -> None:
        self.data, self.path = data, path
        self._parts: dict[str, Any] = {"X": data.X, "obs": data.obs, "var": data.var}
        self._parts |= {f"layers/{k}": v for k, v in data.layers.items()}
        self._parts |= {f"obsm/{k}": v for k, v in data.obsm.items()}
        if data.raw is not None:
            self._parts |= {"raw/X": data.raw.X, "raw/var": pd.DataFrame(data.raw.var)}

    def __contains__(self, key: str) -> bool:
        """Return whether an element exists; an empty mapping in ``uns`` counts as absent."""
        if key.startswith("uns/"):
            found = self.group(key)
            return bool(found) if isinstance(found, Mapping) else found is not None
        return self._parts.get(key) is not None

    def __getitem__(self, key: str) -> Any:
        """Return one element; an element of an AnnData that is backed by a file is read into memory."""
        value = self.group(key) if key.startswith("uns/") else self._parts[key]
        if hasattr(value, "to_memory"):
            return value.to_memory()
        return value[()] if isinstance(value, h5py.Dataset) else value

    def keys(self, group: str) -> list[str]:
        """Return the names in a group, empty if it does not exist."""
        if group == "uns" or group.startswith("uns/"):
            found = self.group(group)
            return list(found) if isinstance(found, Mapping) else []
        return [k.split("/", 1)[1] for k in self._parts if k.startswith(f"{group}/")]

    def group(self, key: str) -> Any:
        """Return a mapping or value of ``uns``, {} if it does not exist."""
        found: Any = self.data.uns
        for part in key.split("/")[1:]:
            if not isinstance(found, Mapping) or part not in found:
                return {}
            found = found[part]
        return found


def is_zarr(path: Path) -> bool:
    """Return whether a folder is an AnnData in zarr (version 2 or 3), and not a SpatialData store."""
    for name in (".zattrs", "zarr.json"):
        file = path / name
        if file.is_file():
            text = head_text(file)
            return '"anndata"' in text and "spatialdata_attrs" not in text[:2000]
    return False


def files_of(path: Path) -> list[Path]:
    """Return the AnnData files and zarr folders that a path is or contains, sorted; empty if there are none."""
    if path.is_dir():
        if is_zarr(path):
            return [path]
        found = [p for suffix in SUFFIXES for p in find(path, f"*{suffix}") if p.is_file()]
        return sorted([*found, *(p for p in find(path, "*.zarr") if p.is_dir() and is_zarr(p))])
    return [path] if is_anndata_file(path) else []


def is_anndata_file(path: Path) -> bool:
    """Return whether a file is an AnnData by its suffix, or by its content under another name (``data.h5``, ``a.h5ad (1)``)."""
    if path.name.lower().endswith(SUFFIXES):
        return True
    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    try:
        with open_hdf5(path, "an .h5ad", "copy or download it again") as file:
            return "obs" in file and "var" in file
    except SourceError:
        return False


def stem_of(path: Path) -> str:
    """Return the file name without its suffix."""
    return re.sub(
        r"\.(?:h5ad|zarr|h5|hdf5)$", "", re.sub(r"\.gz$", "", path.name, flags=re.IGNORECASE), flags=re.IGNORECASE
    )


@contextmanager
def open_store(path: Path) -> Iterator[Store]:
    """Open an AnnData; files written before anndata 0.7 are converted in memory.

    Raises
    ------
    SourceError
        The file or store cannot be read, refers to other files or is refused as unsafe, or the package zarr is not installed.
    """
    if path.is_dir():
        with reading(path, "an AnnData in zarr"):
            yield FileStore(_open_zarr(path), path)
        return
    with open_h5ad(path) as file, reading(path, ".h5ad"):
        if "mod" in file and "X" not in file:
            raise SourceError(
                f"{path}: a MuData of several modalities ({', '.join(list(file['mod'])[:8])}), not an AnnData; write the one with the "
                "counts as .h5ad (mdata.mod['rna'].write_h5ad)"
            )
        legacy = any(isinstance(file.get(k), h5py.Dataset) for k in ("obs", "var", "obsm", "raw.var"))
        if not legacy:
            yield FileStore(file, path)
            return
    yield MemoryStore(_read_legacy(path), path)


def open_h5ad(path: Path) -> h5py.File:
    """Open an ``.h5ad`` file, compressed with gzip or not; raises SourceError as :func:`open_hdf5` does."""
    try:
        return open_hdf5(unpacked(path), "an .h5ad", "copy or download it again")
    except SourceError as error:
        reason = not_data(path)
        if reason is None:
            raise
        raise SourceError(f"{path}: {reason}") from error


def read_part(root: Any, key: str, path: Path) -> Any:
    """Read one element of an AnnData file and check its type.

    Raises
    ------
    SourceError
        The element cannot be read, or has another type than an AnnData stores under this name.
    """
    return _checked(_read_part(root, key, path), key, path)


def _checked(value: Any, key: str, path: Path) -> Any:
    """Return an element after checking its type: tables are data frames, expression is a numeric matrix."""
    if key in ("obs", "var", "raw/var") and not isinstance(value, pd.DataFrame):
        raise SourceError(
            f"{path}: {key} is {type(value).__name__}, expected a table; write the file again with anndata"
        )
    if key in ("X", "raw/X") or key.startswith("layers/"):
        shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", None)
        if isinstance(value, pd.DataFrame) or len(shape) != 2 or getattr(dtype, "kind", "") not in "fiub":
            raise SourceError(
                f"{path}: {key} is {type(value).__name__} of shape {shape} and type {dtype}, expected spots x genes with "
                "numbers; write the file again with anndata"
            )
    return value


def _check_columns(root: Any, key: str, path: Path) -> None:
    """Check that the columns of a table in HDF5 have equal lengths, before any of them is read."""
    group = root.get(key) if isinstance(root, h5py.Group) else None
    if not isinstance(group, h5py.Group) or group.attrs.get("encoding-type") != "dataframe":
        return
    lengths = {}
    for name in group:
        item = group[name]
        item = next((item[k] for k in ("codes", "values") if k in item), None) if isinstance(item, h5py.Group) else item
        if isinstance(item, h5py.Dataset) and item.shape and name != "__categories":
            lengths[name] = item.shape[0]
    if len(set(lengths.values())) > 1:
        shown = ", ".join(
            f"{n} {k}" for n, k in sorted(lengths.items(), key=lambda i: i[1])[:: max(1, len(lengths) - 1)]
        )
        raise SourceError(
            f"{path}: columns of {key} have different lengths ({shown}); write the file again with anndata"
        )


def _check_sparse(root: Any, key: str, path: Path) -> None:
    """Check that the arrays of a sparse matrix in HDF5 have matching lengths, before any of them is read."""
    group = root.get(key) if isinstance(root, h5py.Group) else None
    names = ("data", "indices", "indptr")
    if not isinstance(group, h5py.Group) or not all(isinstance(group.get(n), h5py.Dataset) for n in names):
        return
    shapes = {n: group[n].shape for n in names}
    pointer = shapes["indptr"]
    stored = int(group["indptr"][-1]) if pointer and len(pointer) == 1 and pointer[0] else None
    if not shapes["data"] == shapes["indices"] == (stored,):
        ends = f"of shape {pointer}" if stored is None else f"that ends at {stored}"
        raise SourceError(
            f"{path}: {key} has data of shape {shapes['data']}, indices of shape {shapes['indices']} and an indptr {ends}, which "
            "do not match; copy or download the file again"
        )
    shape, kind = group.attrs.get("shape", ()), str(group.attrs.get("encoding-type", ""))
    if len(shape) == 2 and kind in ("csr_matrix", "csc_matrix"):
        check_entries(group["indptr"][()], int(shape[1 if kind == "csr_matrix" else 0]), f"{path}: {key}")


def check_shapes(file: h5py.File, path: Path) -> None:
    """Check all matrices of an AnnData file as :func:`read_part` checks one, before anndata reads them together."""
    with reading(path, ".h5ad"):
        groups = [(name, file.get(name)) for name in ("layers", "obsm")]
        names = [f"{group}/{name}" for group, found in groups if isinstance(found, h5py.Group) for name in found]
        for key in ("X", "raw/X", *names):
            _check_shape(file, key, path)


def _check_shape(root: Any, key: str, path: Path) -> None:
    """Check rows and columns of a matrix against ``obs`` and ``var`` before it is read: an empty dataset of a few bytes can claim any shape."""
    is_expression = key in ("X", "raw/X") or key.startswith("layers/")
    if not is_expression and not key.startswith("obsm/"):
        return
    shape = _shape_of(root, key)
    if is_expression and len(shape) not in (0, 2):
        raise SourceError(
            f"{path}: {key} is of shape {shape}, expected spots x genes; write the file again with anndata"
        )
    tables = ("obs", "raw/var" if key == "raw/X" else "var") if is_expression else ("obs",)
    for table, found, axis in zip(tables, shape, ("rows", "columns"), strict=False):
        length = next(iter(_shape_of(root, table)), found)
        if found != length:
            raise SourceError(
                f"{path}: {key} has {found:,} {axis}, but {table} has {length:,} rows; copy or download the file again, or write it "
                "again with anndata"
            )


def _shape_of(root: Any, key: str) -> tuple[int, ...]:
    """Return the shape of a matrix, or the number of rows of a table, from its metadata; empty if the file does not state it."""
    if key not in root:
        return ()
    item = root[key]
    if hasattr(item, "keys"):
        index = str(item.attrs.get("_index", "_index"))
        shape = item.attrs["shape"] if "shape" in item.attrs else getattr(item.get(index), "shape", ())
    else:
        shape = getattr(item, "shape", ())
    return tuple(int(n) for n in np.atleast_1d(shape if shape is not None else ()))


def _read_part(root: Any, key: str, path: Path) -> Any:
    try:
        _check_shape(root, key, path)
        _check_columns(root, key, path)
        _check_sparse(root, key, path)
        if key not in root:
            raise SourceError(f"{path}: no {key}; write the file again with anndata")
        return read_elem(root[key])
    except SourceError:
        raise
    except Exception as error:  # anndata raises many kinds of errors
        plugin = _missing_plugin(root, key)
        installed = bool(plugin) and _has_plugins()
        if installed and not _missing_plugin(root, key):
            return read_elem(root[key])
        if plugin:
            fix = "" if installed else "pip install hdf5plugin, or "
            raise SourceError(
                f"{path}: {key} is compressed with {plugin}, which needs an HDF5 plugin; {fix}write the file with "
                "compression='gzip'"
            ) from error
        raise SourceError(f"{path}: {key} cannot be read ({type(error).__name__}: {error}); {fix_of(error)}") from error


def _has_plugins() -> bool:
    """Register the compression plugins of hdf5plugin, and return whether it is installed."""
    try:
        import_module("hdf5plugin")
    except ImportError:
        return False
    return True


def _missing_plugin(root: Any, key: str) -> str:
    """Return the name of a compression plugin that an element needs and that is not available, or ""."""
    names: list[str] = []

    def visit(_: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        filters = item.id.get_create_plist()
        for i in range(filters.get_nfilters()):
            number = filters.get_filter(i)[0]
            if number >= _PLUGIN_IDS and not h5py.h5z.filter_avail(number):
                names.append(f"{_PLUGINS.get(number, 'an unknown filter')} (HDF5 filter {number})")

    if isinstance(root, h5py.Group) and key in root:
        item = root[key]
        visit(key, item)
        if isinstance(item, h5py.Group):
            item.visititems(visit)
    return names[0] if names else ""


def _read_legacy(path: Path) -> ad.AnnData:
    with open_h5ad(path) as file:
        check_shapes(file, path)
    try:
        return ad.read_h5ad(unpacked(path))
    except Exception as error:  # anndata raises many kinds of errors
        raise SourceError(
            f"{path}: written before anndata 0.7 and cannot be converted ({type(error).__name__}: {error}); read it with "
            "anndata 0.7 and write it again"
        ) from error


def _open_zarr(path: Path) -> Any:
    check_store(path, "an AnnData store")
    try:
        zarr = import_module("zarr")
    except ImportError as error:
        raise SourceError(f"{path}: .zarr needs an optional dependency: {install_extra('wsi')}") from error
    try:
        return zarr.open_group(str(path), mode="r")
    except Exception as error:  # zarr raises many kinds of errors
        raise SourceError(
            f"{path}: cannot be read as zarr ({type(error).__name__}: {error}); {fix_of(error)}"
        ) from error
