"""Numbers of spots and genes, and the image size, of a section from the headers of its files.

Only HDF5 shapes, Parquet footers, Zarr metadata, lines of spot tables, and headers of matrices and images are read. Spots
outside tissue and squares with little content are known only when the section is read, so the number of spots is an upper
bound, and that of pseudo-spots an estimate from an area.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import pyarrow.parquet as pq

from comtip_shards.errors import SourceError
from comtip_shards.sections.section import SectionMeta
from comtip_shards.slides.open import IMAGE_SUFFIXES, VENDOR_SUFFIXES, image_size
from comtip_shards.sources.anndata_parts.picture import library_names
from comtip_shards.sources.base import Preview, SectionSource
from comtip_shards.sources.files.table_size import MAX_LINE
from comtip_shards.sources.hdf5.opening import open_hdf5
from comtip_shards.sources.tenx.features import GENE_KIND
from comtip_shards.storage.regular_file import read_regular

WIDE = 12
"""Minimum number of columns of a table that is read as counts, with a gene per column."""
MAX_LINES = 20_000_000
"""Maximum number of rows that are counted; the size of a longer table is unknown."""
_BLOCK = 1 << 20
_UNREADABLE = (SourceError, OSError, ValueError, KeyError, EOFError, RuntimeError)
"""Errors of damaged files, which are ignored: a build reports them with their fix."""


@dataclass(frozen=True)
class SectionSize:
    """Size of a section according to its headers; a value that they do not state is None."""

    spots: int | None = None
    """Upper bound on the number of spots; an estimate for pooled sections."""
    genes: int | None = None
    """Number of genes, or of all features where the headers do not state their types."""
    image: str = ""
    """Name of the image, "" if it is unknown."""
    image_px: tuple[int, int] | None = None
    """(width, height) of the image."""
    n_bytes: int = 0
    """Total size of the input files."""

    def update(self, **found: Any) -> SectionSize:
        """Return the size completed with what was found in a file; of two numbers of spots, the smaller is kept."""
        spots = [n for n in (self.spots, found.get("spots")) if n is not None]
        return SectionSize(
            min(spots, default=None),
            self.genes if self.genes is not None else found.get("genes"),
            self.image or found.get("image", ""),
            self.image_px or found.get("image_px"),
            self.n_bytes,
        )


def section_size(source: SectionSource) -> SectionSize:
    """Return the size of a section from the headers of its inputs; files that cannot be read are ignored."""
    size = SectionSize(n_bytes=sum(p.stat().st_size for p in source.inputs if p.is_file()))
    for path in sorted(source.inputs, key=lambda p: _suffix(p) not in IMAGE_SUFFIXES):
        size = size.update(**_header(path, source.meta))
    if source.meta.pooling and size.spots is not None:
        size = SectionSize(_pooled(source, size.spots), size.genes, size.image, size.image_px, size.n_bytes)
    return size


def previewed(size: SectionSize, found: Preview) -> SectionSize:
    """Return ``size``, from headers, with its values replaced by those that the reader of the format states in ``found``."""
    return SectionSize(
        size.spots if found.spots is None else found.spots,
        size.genes if found.genes is None else found.genes,
        found.image or size.image,
        found.image_px or size.image_px,
        size.n_bytes,
    )


def _header(path: Path, meta: SectionMeta) -> dict[str, Any]:
    suffix = _suffix(path)
    try:
        if suffix in IMAGE_SUFFIXES | VENDOR_SUFFIXES:
            return {"image": path.name, "image_px": image_size(path)}
        if suffix in (".h5", ".h5ad", ".hdf5"):
            with open_hdf5(path, "an HDF5 file", "copy it again") as file:
                return _hdf5(file, path, meta)
        if suffix == ".parquet":
            return {} if "transcripts" in path.name else {"spots": pq.ParquetFile(path).metadata.num_rows}
        if suffix == ".mtx":
            return _matrix_market(path)
        if suffix in (".tsv", ".csv") and not path.name.startswith(("features.", "genes.", "barcodes.")):
            return _table(path)
        if path.name in ("zarr.json", ".zarray") and "tables" in path.parts:
            return _zarr_table(path)
    except _UNREADABLE:
        return {}
    return {}


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _hdf5(file: h5py.File, path: Path, meta: SectionMeta) -> dict[str, Any]:
    """Return the size stated in a 10x matrix, an AnnData, or a file of HEST patches."""
    if "matrix/shape" in file:
        features, barcodes = (int(n) for n in file["matrix/shape"][:2])
        kinds = file.get("matrix/features/feature_type")
        if isinstance(kinds, h5py.Dataset) and kinds.shape == (features,):  # antibodies and others are not trained
            features = int(np.isin(kinds[:].astype(bytes), [GENE_KIND.encode(), b""]).sum())
        return {"spots": barcodes, "genes": features}
    if "img" in file and isinstance(file["img"], h5py.Dataset):
        return {"spots": int(file["img"].shape[0]), "image": f"{path.name} (patches)"}
    if "X" not in file and "obs" not in file:
        return {}
    shape = file["X"].attrs.get("shape", file["X"].attrs.get("h5sparse_shape", getattr(file["X"], "shape", None)))
    found: dict[str, Any] = {"genes": int(shape[1])}
    libraries = library_names(file.get("uns/spatial"))
    if len(libraries) <= 1:
        found["spots"] = int(shape[0])
    pictures = [
        (int(np.prod(image.shape[:2])), name, image.shape)
        for library in (libraries if len(libraries) <= 1 else [n for n in libraries if n == meta.section_id])
        for name, image in file.get(f"uns/spatial/{library}/images", {}).items()
        if isinstance(image, h5py.Dataset) and len(image.shape) == 3
    ]
    if pictures:
        _, name, image_shape = max(pictures)
        found |= {"image": f"{name} in {path.name}", "image_px": (int(image_shape[1]), int(image_shape[0]))}
    return found


def _matrix_market(path: Path) -> dict[str, Any]:
    """Return the size of a MEX matrix (features x barcodes) from the line with its shape."""
    with _opened(path) as file:
        for _ in range(1000):
            line = file.readline(_BLOCK).decode("ascii", "replace")
            if not line.startswith("%"):
                genes, barcodes = (int(n) for n in line.split()[:2])
                return {"spots": barcodes, "genes": genes}
    return {}


def _table(path: Path) -> dict[str, Any]:
    """Return the number of rows (in tissue) of a table of spots, or the number of genes of a table of counts; {} if unknown."""
    with _opened(path) as file:
        header = file.readline(MAX_LINE)
        sep = b"\t" if b"\t" in header else b","
        columns = header.count(sep) + 1
        if columns >= WIDE:
            # R omits the name of the id column.
            return {"genes": file.readline(MAX_LINE).count(sep)}
        names = [name.strip().strip(b'"') for name in header.lower().split(sep)]
        if all(map(_is_number, names)) or b"fixedx" in names:
            return {}  # matrix or keypoints of an alignment
        tissue = names.index(b"in_tissue") if b"in_tissue" in names else None
        rows = 0 if tissue is not None or not _is_number(names[-1]) else 1
        while line := file.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                return {}  # no table
            fields = line.split(sep) if tissue is not None else []
            rows += tissue is None or (tissue < len(fields) and _is_yes(fields[tissue]))
            if rows > MAX_LINES:
                return {}
    return {"spots": rows}


def _zarr_table(path: Path) -> dict[str, Any]:
    """Return the size of a SpatialData table from the metadata of its ``X``, sparse or dense."""
    where = path.parts[path.parts.index("tables") + 2 :]
    if where[:1] != ("X",) or len(where) != 2:
        return {}
    entry = json.loads(read_regular(path, _BLOCK))
    shape = entry.get("attributes", {}).get("shape") or entry.get("shape")
    return {"spots": int(shape[0]), "genes": int(shape[1])} if shape and len(shape) == 2 else {}


def _pooled(source: SectionSource, n: int) -> int:
    """Return the estimated number of pseudo-spots from ``n`` bins or cells, at most ``n`` for cells."""
    meta, words = source.meta, source.meta.pooling.split()
    if words[:2] == ["bins", "of"]:
        return max(1, round(n * (float(words[2]) / meta.spot_pitch_um) ** 2))
    cells = next((p for p in source.inputs if p.name == "cells.parquet"), None)
    try:
        area = _area_um2(cells, ("x_centroid", "y_centroid")) if cells is not None else None
    except _UNREADABLE:
        area = None
    return n if area is None else min(n, max(1, round(area / meta.spot_pitch_um**2)))


def _area_um2(path: Path, columns: Sequence[str]) -> float | None:
    """Return the area of the bounding box of two columns from the statistics in a Parquet footer, None without statistics."""
    footer = pq.ParquetFile(path).metadata
    sides = []
    for name in columns:
        index = footer.schema.names.index(name)
        found = [footer.row_group(i).column(index).statistics for i in range(footer.num_row_groups)]
        if not found or any(s is None or not s.has_min_max for s in found):
            return None
        sides.append(float(max(s.max for s in found)) - float(min(s.min for s in found)))
    return sides[0] * sides[1]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not packed:
            yield raw
            return
        with gzip.open(raw) as file:
            yield file  # type: ignore[misc]


def _is_yes(value: bytes) -> bool:
    return value.strip().strip(b'"').lower() in (b"1", b"1.0", b"true", b"t", b"yes")


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
