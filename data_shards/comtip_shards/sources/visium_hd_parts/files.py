"""Files of a Visium HD folder, and the numbers in its barcodes."""

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
    """Return {bin width in um: folder}, largest first; ``path`` may be one of these folders."""
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
    """Return the table of positions of one bin width; Parquet has precedence over csv."""
    found = [p for files in by_prefix(folder / "spatial", TABLE).values() for p in files]
    return next((p for p in found if ".parquet" in p.name), found[0] if found else None)


def find_factors(spatial: Path) -> Path | None:
    """Return the file of scale factors, which early Visium HD data sets lack."""
    found = [p for files in by_prefix(spatial, re.escape(FACTORS)).values() for p in files]
    return found[0] if found else None


def pictures_of(folder: Path, root: Path) -> dict[str, Path]:
    """Return the downscaled images: next to the positions, or shared by all bins."""
    return find_pictures(folder / "spatial") or find_pictures(root / "spatial")


def numbers_in(names: pa.Array, pattern: str, path: Path, like: str) -> dict[str, np.ndarray]:
    """Parse the numbers in barcodes, int64 per group of ``pattern``."""
    with reading(path, "names of bins or cells"):
        found = pc.extract_regex(pc.cast(names, pa.string()), pattern)
    if found.null_count:
        bad = names[pc.index(pc.is_null(found), True).as_py()].as_py()
        raise SourceError(f"{path}: barcode {bad!r} is not of the form {like}; use the files of one Visium HD run")
    return {
        f.name: pc.cast(pc.struct_field(found, i), pa.int64()).to_numpy(zero_copy_only=False)
        for i, f in enumerate(found.type)
    }
