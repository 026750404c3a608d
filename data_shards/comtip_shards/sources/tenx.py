"""What the folders of 10x Genomics share: feature-barcode matrices (h5 and MEX), scale factors, which image is meant."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy import io as scipy_io
from scipy import sparse

from comtip_shards.errors import SourceError
from comtip_shards.slides.appearance import looks_like_he
from comtip_shards.slides.open import image_size, open_slide
from comtip_shards.sources.base import as_counts, existing, reading
from comtip_shards.sources.hdf5 import open_hdf5

GENE_KIND, MATRIX = "Gene Expression", "a feature-barcode matrix of 10x Genomics"
JUDGED_PX = 30_000_000
"""Images up to this size are read to say whether they look like H&E; larger ones are left to the section report."""
OVERVIEW_PX = 600
MAX_TEXT_BYTES = 2**30
"""Most bytes of a list of barcodes or features, unpacked; 10 million barcodes have 200 MB."""
_MICROSCOPE = ("microscope_image/*", "*tissue_image.*", "*_image.tif", "*_image.tiff", "*_image.btf", "*_image.jpg")
_IMAGES = {".tif", ".tiff", ".btf", ".jpg", ".jpeg", ".png", ".svs", ".ndpi"}


@dataclass(frozen=True)
class Features:
    """The rows of a matrix."""

    ids: list[str]
    symbols: list[str]
    kinds: list[str]

    def genes(self) -> np.ndarray:
        """Return the rows that are genes, int64; antibodies and controls are not."""
        return np.flatnonzero([kind in ("", GENE_KIND) for kind in self.kinds])

    def only_genes(self) -> Features:
        """Return the rows that are genes."""
        rows = self.genes()
        return Features([self.ids[i] for i in rows], [self.symbols[i] for i in rows], [GENE_KIND] * len(rows))

    def others_note(self) -> list[str]:
        """Say how many rows are left out because they are not genes."""
        return [f"{n} features are not genes: {kind}" for kind, n in self.others().items()]

    def others(self) -> dict[str, int]:
        """Return how many rows are of each other kind."""
        kinds = [k for k in self.kinds if k not in ("", GENE_KIND)]
        return {k: kinds.count(k) for k in sorted(set(kinds))}


@dataclass(frozen=True)
class TenxMatrix:
    """A feature-barcode matrix: an h5 file, or the three files of MEX."""

    path: Path
    files: tuple[Path, ...]

    def features(self) -> Features:
        """Read the rows' names."""
        if self.path.suffix == ".h5":
            with reading(self.path, MATRIX), _open_h5(self.path) as file:
                return _h5_features(file)
        return _mex_features(self.files[1])

    def read(self) -> tuple[sparse.csr_matrix, list[str], Features]:
        """Return (int32 barcodes x genes, barcodes, genes); features that are not genes are left out."""
        features = self.features()
        genes = features.only_genes()
        parts = list(self.chunks(features))
        counts = sparse.vstack([c for _, c in parts], format="csr") if parts else sparse.csr_matrix((0, len(genes.ids)))
        return sparse.csr_matrix(counts), [b for barcodes, _ in parts for b in barcodes], genes

    def chunks(self, features: Features, size: int = 1 << 17) -> Iterator[tuple[list[str], sparse.csr_matrix]]:
        """Yield (barcodes, int32 barcodes x genes), ``size`` barcodes at a time, so that 2 um bins fit memory."""
        rows = features.genes()
        ids = [features.ids[i] for i in rows]
        if self.path.suffix != ".h5":
            barcodes, counts = _read_mex(self, len(features.ids))
            yield barcodes, as_counts(counts[:, rows], self.path, barcodes, ids)
            return
        with reading(self.path, MATRIX), _open_h5(self.path) as file:
            for barcodes, counts in _h5_chunks(file, self.path, len(features.ids), size):
                yield barcodes, as_counts(counts[:, rows], self.path, barcodes, ids)


# -- finding ------------------------------------------------------------------------------------------------


def only(found: Sequence[Path], what: str) -> Path | None:
    """Return the one file found, None for none; refuse to choose between several."""
    if len(found) > 1:
        raise SourceError(
            f"{found[0].parent}: more than one {what}: {', '.join(p.name for p in found[:4])}; keep one, or give "
            "each section a folder of its own"
        )
    return found[0] if found else None


def find_matrix(folder: Path, stem: str) -> TenxMatrix | None:
    """Return ``STEM.h5``, or the folder ``STEM`` with MEX in it; either may be written ``ID_STEM``."""
    h5 = folder / f"{stem}.h5"
    chosen = h5 if h5.is_file() else only(sorted(folder.glob(f"*_{stem}.h5")), f"{stem}.h5")
    if chosen is not None:
        return TenxMatrix(chosen, (chosen,))
    inner = folder / stem
    inner = inner if inner.is_dir() else only(sorted(folder.glob(f"*_{stem}")), f"folder {stem}") or inner
    # The first Cell Ranger matrices lie one folder deeper, named by genome.
    matrix = only(sorted(inner.rglob("*matrix.mtx*")), "matrix.mtx") if inner.is_dir() else None
    return None if matrix is None else _mex(matrix)


def _mex(matrix: Path) -> TenxMatrix:
    prefix = matrix.name.split("matrix.mtx")[0]
    files = [matrix]
    for names in (("features.tsv", "genes.tsv"), ("barcodes.tsv",)):
        there = [p for n in names for end in (".gz", "") if (p := matrix.parent / f"{prefix}{n}{end}").is_file()]
        if not there:
            raise SourceError(f"{matrix.parent}: {prefix}{names[0]}.gz is not there")
        files.append(there[0])
    return TenxMatrix(matrix.parent, tuple(files))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        data = json.loads(existing(path, what).read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise SourceError(f"{path}: not a JSON object")
    return data


def scale_factors(path: Path) -> dict[str, float]:
    """Read ``scalefactors_json.json``."""
    data = read_json(path, "scale of the pictures")
    return {str(k): float(v) for k, v in data.items() if isinstance(v, int | float)}


# -- images -------------------------------------------------------------------------------------------------


def choose_image(root: Path, spatial: Path, factors: Mapping[str, float], stated: str) -> tuple[Path, float, list[str]]:
    """Return (image, its px per full-resolution px, notes).

    Positions are px of the image that the pipeline was given. The pictures in ``spatial/`` are shrunk from it, so
    they are taken only where the caller says so: ``stated`` is a path, ``hires``, ``lowres`` or empty.
    """
    if stated in ("hires", "lowres"):
        return _picture(spatial, factors, stated)
    image = existing(Path(stated), "full-resolution image (--image)") if stated else _microscope_image(root)
    if image is None:
        have = [p.name for p in sorted(spatial.glob("tissue_*_image.png"))]
        also = (
            f"To cut tiles from {' or '.join(have)} all the same, say --image "
            f"{' or '.join(n.split('_')[1] for n in have)}"
            if have else "There is no tissue_hires_image.png to fall back on"
        )  # fmt: skip
        raise SourceError(
            f"{root}: the image that the positions belong to is not there; give the original microscope image that "
            f"Space Ranger was given, with --image. {also}"
        )
    check_full_resolution(image, spatial, factors)
    return image, 1.0, [] if stated else [f"full-resolution image: {image.name}"]


def _picture(spatial: Path, factors: Mapping[str, float], which: str) -> tuple[Path, float, list[str]]:
    picture, key = spatial / f"tissue_{which}_image.png", f"tissue_{which}_scalef"
    if not picture.is_file():
        have = ", ".join(p.name for p in sorted(spatial.glob("tissue_*_image.png"))) or "no picture"
        raise SourceError(f"{picture}: not in the folder, which has {have}; give the original image with --image")
    if not factors.get(key, 0) > 0:
        raise SourceError(
            f"{spatial}: scalefactors_json.json lacks {key}, so {picture.name} has no scale; give --image"
        )
    scale = factors[key]
    return picture, scale, [f"tiles are cut from {picture.name}, {scale:.4f} of full resolution, as asked for"]


def _microscope_image(root: Path) -> Path | None:
    for pattern in _MICROSCOPE:
        found = [p for p in sorted(root.glob(pattern)) if p.suffix.lower() in _IMAGES and "cytassist" not in p.name]
        if found:
            return only(found, "image (say which with --image)")
    return None


def check_full_resolution(image: Path, spatial: Path, factors: Mapping[str, float]) -> None:
    """Refuse an image of another size than the one that the pictures in ``spatial/`` were shrunk from."""
    width, height = image_size(image)
    for which in ("hires", "lowres"):
        picture, scale = spatial / f"tissue_{which}_image.png", factors.get(f"tissue_{which}_scalef", 0.0)
        if not picture.is_file() or not scale > 0:
            continue
        small = image_size(picture)
        want = (small[0] / scale, small[1] / scale)
        if all(abs(a - b) <= 0.01 * b + 1 / scale for a, b in zip((width, height), want, strict=True)):
            continue
        same = all(abs(a - b) <= 2 for a, b in zip((width, height), small, strict=True))
        raise SourceError(
            f"{image}: {width} x {height} px, but the positions belong to an image of about {want[0]:.0f} x {want[1]:.0f} "
            f"px ({picture.name} and its scale factor say so); "
            + (f"it is the {which} picture: say --image {which} to use it" if same else "give that one with --image")
        )


def appearance_note(image: Path) -> list[str]:
    """Return a note where an image does not look like H&E; images too large to read twice are not judged."""
    width, height = image_size(image)
    if width * height > JUDGED_PX:
        return []
    with open_slide(image) as slide:
        looks, reason = looks_like_he(slide.overview(OVERVIEW_PX)[0])
    return [] if looks else [f"{image.name} does not look like H&E: {reason}"]


def section_name(path: Path) -> str:
    """Return the name of a run: its folder's, or the one above ``outs``."""
    path = path.resolve()
    return path.parent.name if path.name == "outs" else path.name


# -- species ------------------------------------------------------------------------------------------------


def species_of(ids: Sequence[str], where: Path) -> str:
    """Tell the species by Ensembl ids."""
    for prefix, species in (("ENSG", "human"), ("ENSMUSG", "mouse")):
        if sum(i.startswith(prefix) for i in ids) > 0.5 * len(ids):
            return species
    raise SourceError(f"{where}: the species cannot be told from gene ids such as {', '.join(ids[:3])}; give --species")


# -- h5 and MEX ---------------------------------------------------------------------------------------------


def _open_h5(path: Path) -> h5py.File:
    file = open_hdf5(path, "an HDF5 file", "is it whole?")
    needed = ("features/id", "barcodes", "data", "indices", "indptr", "shape")
    missing = [n for n in needed if f"matrix/{n}" not in file]
    if missing:
        file.close()
        raise SourceError(f"{path}: no /matrix/{missing[0]}; this is not {MATRIX}")
    return file


def _strings(values: Any) -> list[str]:
    return [v.decode() if isinstance(v, bytes) else str(v) for v in values]


def _h5_features(file: h5py.File) -> Features:
    group = file["matrix/features"]
    ids = _strings(group["id"][()])
    symbols, kinds = (_strings(group[n][()]) if n in group else [""] * len(ids) for n in ("name", "feature_type"))
    return Features(ids, symbols, kinds)


def _h5_chunks(
    file: h5py.File, path: Path, n_features: int, size: int
) -> Iterator[tuple[list[str], sparse.csr_matrix]]:
    group = file["matrix"]
    indptr = group["indptr"][()].astype(np.int64)
    shape = tuple(int(v) for v in group["shape"][()])
    n = len(group["barcodes"])
    if shape != (n_features, n) or len(indptr) != n + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise SourceError(
            f"{path}: the matrix is {shape}, but there are {n_features} features and {n} barcodes, or its index is damaged"
        )
    for start in range(0, n, size):
        stop = min(start + size, n)
        part = slice(int(indptr[start]), int(indptr[stop]))
        indices, data = group["indices"][part], group["data"][part]
        if len(indices) != part.stop - part.start or len(data) != len(indices):
            raise SourceError(f"{path}: ends before its last barcode; is the file whole?")
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n_features:
            raise SourceError(f"{path}: an index points beyond its {n_features} features")
        pointer = indptr[start : stop + 1] - indptr[start]
        yield (
            _strings(group["barcodes"][start:stop]),
            sparse.csr_matrix((data, indices, pointer), (stop - start, n_features)),
        )


def _read_mex(matrix: TenxMatrix, n_features: int) -> tuple[list[str], sparse.csr_matrix]:
    path, _, barcodes_file = matrix.files
    barcodes = [line.split("\t")[0] for line in _lines(barcodes_file)]
    with reading(path, "a Matrix Market file"):
        counts = sparse.csc_matrix(scipy_io.mmread(path))
    if counts.shape != (n_features, len(barcodes)):
        raise SourceError(
            f"{path}: the matrix is {counts.shape}, but there are {n_features} features and {len(barcodes)} barcodes"
        )
    return barcodes, sparse.csr_matrix(counts.T)


def _lines(path: Path) -> list[str]:
    with reading(path, "lines of text"):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(MAX_TEXT_BYTES + 1)
        if len(raw) > MAX_TEXT_BYTES:
            raise SourceError(
                f"{path}: more than {MAX_TEXT_BYTES:,} bytes of text, unpacked; no list of names is that long"
            )
        return raw.decode("utf-8").splitlines()


def _mex_features(path: Path) -> Features:
    """Read features.tsv (id, symbol, kind) or the older genes.tsv (id, symbol)."""
    rows = [(re.split(r"\t", line) + ["", ""])[:3] for line in _lines(path)]
    return Features(*([row[i] for row in rows] for i in range(3)))
