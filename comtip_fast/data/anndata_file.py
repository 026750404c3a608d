"""Reading of AnnData files, and choice of one of their sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
from comtip_shards import SourceError
from comtip_shards.sources.anndata_parts.libraries import Library, libraries_of
from comtip_shards.sources.anndata_parts.picture import library_names
from comtip_shards.sources.anndata_parts.store import Store, check_shapes, open_h5ad
from comtip_shards.sources.files.packaging import unpacked


def read_h5ad(path: Path | str) -> ad.AnnData:
    """Read an AnnData file.

    Raises
    ------
    SourceError
        The file is missing, is not a readable ``.h5ad``, links to another file, or has a matrix whose shape differs from the tables.
    """
    with open_h5ad(Path(path)) as opened:  # raises for files that are not HDF5, and for links to other files
        check_shapes(opened, Path(path))
    try:
        return ad.read_h5ad(unpacked(Path(path)))
    except (SourceError, MemoryError):
        raise
    except Exception as error:  # anndata raises many kinds of errors
        raise SourceError(
            f"{path}: not a readable .h5ad file ({type(error).__name__}: {error}); write it with AnnData.write_h5ad"
        ) from error


def read_annotation(path: Path) -> ad.AnnData:
    """Read an AnnData file without its matrices (X, layers, raw, varm, obsp, varp), which prediction does not need.

    A file of anndata 0.6, whose tables have another format, is read with its matrices.

    Raises
    ------
    SourceError
        The file is missing, is not a readable ``.h5ad``, links to another file, or has a matrix whose shape differs from the tables.
    """
    with open_h5ad(path) as opened:
        check_shapes(opened, path)
    try:
        with h5py.File(unpacked(path), "r") as file:
            if not all(
                isinstance(file.get(key), h5py.Group) and "encoding-type" in file[key].attrs for key in ("obs", "var")
            ):
                return read_h5ad(path)  # compound tables of anndata 0.6, which only anndata's full reader supports
            parts = {key: ad.io.read_elem(file[key]) for key in ("obs", "var", "obsm", "uns") if key in file}
            return ad.AnnData(**parts)
    except (SourceError, MemoryError):
        raise
    except Exception as error:  # anndata raises many kinds of errors
        raise SourceError(
            f"{path}: not a readable .h5ad file ({type(error).__name__}: {error}); write it with AnnData.write_h5ad"
        ) from error


def chosen_library(store: Store, section_id: str) -> tuple[str, Library]:
    """Return the id and the library of the section that ``section_id`` names, or of the only section if no id is given.

    Parameters
    ----------
    store
        The AnnData.
    section_id
        Id that the section has in a shard set built from the file, or its key in ``uns["spatial"]``; "" for the only section.

    Raises
    ------
    SourceError
        No section has this id; no id is given and there are several sections; or the sections cannot be distinguished.
    """
    found = libraries_of(store)
    if not section_id:
        if len(found) > 1:
            one = (
                f"name one of them, e.g. {store.path}:{next(iter(found))}"
                if store.path.exists()
                else "keep the spots of one section only"
            )
            raise SourceError(f"{store.path}: {len(found)} sections ({', '.join(found)}); {one}")
        return next(iter(found.items()))
    for name, library in found.items():
        if section_id in (name, library.key, library.value):
            return name, library
    fix = "choose one" if len(found) > 1 else "choose this one, or name no section"
    raise SourceError(f"{store.path}: no section {section_id!r}; its sections: {', '.join(found)}; {fix}")


def own_entries(data: ad.AnnData, library: Library) -> dict[str, Any]:
    """Return ``uns["spatial"]`` without the libraries of other sections."""
    spatial = data.uns.get("spatial", {})
    others = set(library_names(spatial)) - {library.key}
    return {name: value for name, value in spatial.items() if name not in others} if others else spatial


def rows_copy(section: str | Path | ad.AnnData, rows: np.ndarray, spatial: Any) -> ad.AnnData:
    """Return a copy of a section's rows, with ``spatial`` as ``uns["spatial"]``.

    If these are all rows of the AnnData, the complete AnnData is copied and its ``uns["spatial"]`` is kept.

    Parameters
    ----------
    section
        The AnnData, the path of an ``.h5ad``, or this path with ``:section_id``.
    rows
        int64, rows of the section.
    spatial
        ``uns["spatial"]`` of the section.
    """
    if isinstance(section, ad.AnnData):
        data, own = (section.to_memory(), True) if section.isbacked else (section, False)
    else:
        data, own = read_h5ad(section if Path(section).exists() else str(section).rpartition(":")[0]), True
    if len(rows) == data.n_obs:
        return data if own else data.copy()
    data = data[rows].copy()
    data.uns["spatial"] = spatial
    return data
