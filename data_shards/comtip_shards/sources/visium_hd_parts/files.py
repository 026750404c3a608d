"""File search in a Visium HD folder, and parsing of its barcodes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from comtip_shards.errors import SourceError
from comtip_shards.sources.files.opening import reading
from comtip_shards.sources.files.packaging import by_prefix, find
from comtip_shards.sources.tenx.run import find_pictures

FACTORS, TABLE = "scalefactors_json.json", r"tissue_positions\.(?:parquet|csv)"
BIN_FOLDER = re.compile(r"square_(\d{3})um")


def find_bins(path: Path) -> dict[float, Path]:
    """Return {bin width in um: folder} of folders with a table of positions, largest first; ``path`` may be one of them."""
    folders = [path] if BIN_FOLDER.fullmatch(path.resolve().name) else []
    for parent in (*find(path, "*binned_outputs"), path):
        folders += find(parent, "square_*um")
    found = {
        float(match[1]): folder
        for folder in folders
        if (match := BIN_FOLDER.fullmatch(folder.resolve().name)) and find_table(folder) is not None
    }
    return dict(sorted(found.items(), reverse=True))


def find_table(folder: Path) -> Path | None:
    """Return the table of positions in the folder of one bin width, or None if it does not exist; Parquet takes precedence."""
    found = [p for files in by_prefix(folder / "spatial", TABLE).values() for p in files]
    return next((p for p in found if ".parquet" in p.name.lower()), found[0] if found else None)


def find_factors(spatial: Path) -> Path | None:
    """Return the file of scale factors, None if there is none, as in early Visium HD datasets."""
    found = [p for files in by_prefix(spatial, re.escape(FACTORS)).values() for p in files]
    return found[0] if found else None


def pictures_of(folder: Path, root: Path) -> dict[str, Path]:
    """Return the downscaled images in ``spatial/`` of ``folder``, or else those in ``spatial/`` of the output folder ``root``."""
    return find_pictures(folder / "spatial") or find_pictures(root / "spatial")


def numbers_in(names: pa.Array, pattern: str, path: Path, like: str) -> dict[str, np.ndarray]:
    """Return {group of ``pattern``: its number in each barcode, int64 (n,)}.

    Parameters
    ----------
    names
        Barcodes, text (n,).
    pattern
        Regular expression with named groups of digits.
    path, like
        File and an example of a valid barcode, for messages.

    Raises
    ------
    SourceError
        A barcode does not match the pattern.
    """
    with reading(path, "names of bins or cells"):
        found = pc.extract_regex(pc.cast(names, pa.string()), pattern)
    if found.null_count:
        bad = names[pc.index(pc.is_null(found), True).as_py()].as_py()
        raise SourceError(f"{path}: barcode {bad!r} is not of the form {like}; use the files of one Visium HD run")
    return {
        f.name: pc.cast(pc.struct_field(found, i), pa.int64()).to_numpy(zero_copy_only=False)
        for i, f in enumerate(found.type)
    }
