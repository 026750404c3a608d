"""A Space Ranger ``outs`` folder, versions 1 to 3: counts as h5 or MEX, positions with or without a header.

Positions are px of the full-resolution image that the pipeline was given. Without that image (``image=``) the
hires or lowres picture is used and positions are scaled to it; the report says which.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import io as scipy_io
from scipy import sparse
from scipy.spatial import cKDTree

from comtip_shards.errors import SourceError
from comtip_shards.section import Section, SectionMeta
from comtip_shards.sources.base import SectionSource, Spots, as_counts, existing, join, number, numbers, pick

PITCH_UM, DIAMETER_UM = 100.0, 55.0
POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
PICTURES = (("tissue_hires_image.png", "tissue_hires_scalef"), ("tissue_lowres_image.png", "tissue_lowres_scalef"))


def recognise(path: Path) -> str | None:
    """Return why ``path`` is such a folder, or None."""
    spatial = path / "spatial"
    found = [n for n in (*POSITIONS, "scalefactors_json.json") if (spatial / n).is_file()]
    return f"spatial/ holds {', '.join(found)}" if found else None


def open_sections(path: Path, samples: Sequence[str] | None, overrides: Mapping[str, str]) -> list[SectionSource]:
    """Return the one section of the folder, named by it."""
    name = path.parent.name if path.name == "outs" else path.resolve().name
    pick(samples, [name], path)
    counts = _counts_path(path)
    positions = next((p for n in POSITIONS if (p := path / "spatial" / n).is_file()), None)
    if positions is None:
        raise SourceError(f"{path / 'spatial'}: none of {', '.join(POSITIONS)} is there")
    factors = _scalefactors(existing(path / "spatial" / "scalefactors_json.json", "scale of the pictures"))
    image, scale, notes = _image(path, factors, overrides)
    spots = _read_positions(positions)
    full_mpp = number(overrides["mpp"], "--mpp") if overrides.get("mpp") else _scale(spots, factors, positions, notes)
    if not overrides.get("tissue"):
        raise SourceError(f"{path}: Space Ranger does not say the tissue; give --tissue")
    meta = SectionMeta(
        section_id=name, dataset=name, species=(overrides.get("species") or _species(counts)).lower(),
        tissue=overrides["tissue"], donor=overrides.get("donor", ""), platform=overrides.get("platform", "Visium"),
        licence=overrides.get("licence", ""), attribution=overrides.get("attribution", ""), mpp=full_mpp / scale,
        spot_diameter_um=DIAMETER_UM, spot_pitch_um=PITCH_UM,
    )  # fmt: skip
    placed = Spots(spots.ids, spots.xy * scale, spots.array_xy, spots.labels, spots.in_tissue)

    def load() -> Section:
        matrix, barcodes, ids, symbols = _read_counts(counts)
        aligned = _align_suffix(placed, barcodes)
        return join(meta, image, matrix, barcodes, ids, symbols, aligned, counts, positions, notes)

    return [SectionSource(meta, (image, counts, positions), load)]


def _counts_path(path: Path) -> Path:
    for pattern in ("filtered_feature_bc_matrix.h5", "*_filtered_feature_bc_matrix.h5"):
        found = sorted(path.glob(pattern))
        if found:
            return found[0]
    for folder in ("filtered_feature_bc_matrix", "filtered_gene_bc_matrices"):
        found = sorted((path / folder).rglob("matrix.mtx*"))
        if found:
            return found[0].parent
    raise SourceError(
        f"{path}: neither filtered_feature_bc_matrix.h5 nor the folder filtered_feature_bc_matrix is there"
    )


def _scalefactors(path: Path) -> dict[str, float]:
    try:
        factors = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}: not JSON ({error})") from error
    return {str(k): float(v) for k, v in factors.items() if isinstance(v, (int, float))}


def _image(path: Path, factors: Mapping[str, float], overrides: Mapping[str, str]) -> tuple[Path, float, list[str]]:
    """Return (image, its px per full-resolution px, notes)."""
    if overrides.get("image"):
        return existing(Path(overrides["image"]), "full-resolution image (--image)"), 1.0, []
    for name, key in PICTURES:
        picture = path / "spatial" / name
        if picture.is_file():
            if key not in factors:
                raise SourceError(f"{path}: scalefactors_json.json lacks {key}, so {name} has no scale; give --image")
            note = f"tiles are cut from {name} ({factors[key]:.4f} of full resolution); give --image for the original"
            missing = [n for n, _ in PICTURES if not (path / "spatial" / n).is_file()]
            return picture, factors[key], [note] + [f"{n} is not in the folder" for n in missing]
    raise SourceError(f"{path / 'spatial'}: no tissue_hires_image.png or tissue_lowres_image.png; give --image")


def _read_positions(path: Path) -> Spots:
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path).astype(str)
        else:
            # The file's name does not tell whether there is a header: some "list" files have one.
            with path.open(encoding="utf-8") as file:
                header = file.readline().lower().startswith("barcode")
            table = pd.read_csv(path, header=0 if header else None, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read as tissue positions ({error})") from error
    if table.shape[1] != len(COLUMNS):
        raise SourceError(f"{path}: {table.shape[1]} columns, expected six: {', '.join(COLUMNS)}")
    table.columns = pd.Index(COLUMNS)
    tissue = numbers(table, ["in_tissue"], path)[:, 0] == 1
    return Spots(
        table["barcode"].tolist(), numbers(table, ["pxl_col_in_fullres", "pxl_row_in_fullres"], path),
        numbers(table, ["array_col", "array_row"], path), [""] * len(table), tissue,
    )  # fmt: skip


def _scale(spots: Spots, factors: Mapping[str, float], path: Path, notes: list[str]) -> float:
    """Return um per full-resolution px: stated (Visium HD), else from the 100 um between neighbours."""
    if "microns_per_pixel" in factors:
        return factors["microns_per_pixel"]
    if len(spots.ids) < 2:
        raise SourceError(f"{path}: too few spots to work out the scale; give --mpp")
    gap = cKDTree(spots.xy).query(spots.xy, k=2)[0][:, 1]
    pitch = float(np.median(gap))
    if pitch <= 0:
        raise SourceError(f"{path}: spots lie on one another, no scale can be worked out; give --mpp")
    mpp = PITCH_UM / pitch
    diameter = factors.get("spot_diameter_fullres")
    notes.append(f"scale from the {PITCH_UM:g} um between neighbouring spots: {mpp:.4f} um per full-resolution px")
    if diameter and not 0.7 < diameter * mpp / DIAMETER_UM < 1.5:
        raise SourceError(
            f"{path}: neighbours are {pitch:.1f} px apart but spot_diameter_fullres is {diameter:.1f} px; on a Visium slide "
            "these are 100 and 55 (or 65) um, so positions and scale factors are not of one run; give --mpp if they are"
        )
    return mpp


def _species(counts: Path) -> str:
    """Tell the species by its Ensembl ids."""
    ids = _feature_ids(counts)
    for prefix, species in (("ENSG", "human"), ("ENSMUSG", "mouse")):
        if sum(i.startswith(prefix) for i in ids) > 0.5 * len(ids):
            return species
    raise SourceError(
        f"{counts}: the species cannot be told from gene ids such as {', '.join(ids[:3])}; give --species"
    )


def _feature_ids(counts: Path) -> list[str]:
    if counts.is_dir():
        return _mex_features(counts)["id"].tolist()
    with _open_h5(counts) as file:
        return _strings(file["matrix/features/id"])


def _open_h5(path: Path) -> h5py.File:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise SourceError(f"{path}: not an HDF5 file that can be read ({error})") from error
    if "matrix/features/id" not in file or "matrix/barcodes" not in file:
        raise SourceError(f"{path}: no /matrix/features/id and /matrix/barcodes; this is not a feature-barcode matrix")
    return file


def _strings(dataset: Any) -> list[str]:
    return [v.decode() if isinstance(v, bytes) else str(v) for v in dataset[()]]


def _read_counts(path: Path) -> tuple[sparse.csr_matrix, list[str], list[str], list[str]]:
    """Return (int32 spots x genes, barcodes, gene ids, gene symbols), gene-expression features only."""
    if path.is_dir():
        features = _mex_features(path)
        barcodes = _lines(_mex_file(path, "barcodes.tsv"))
        matrix = sparse.csc_matrix(scipy_io.mmread(_mex_file(path, "matrix.mtx")))
        ids, symbols, kinds = (features[c].tolist() for c in ("id", "symbol", "kind"))
    else:
        with _open_h5(path) as file:
            group = file["matrix"]
            shape = tuple(int(v) for v in group["shape"][()])
            matrix = sparse.csc_matrix((group["data"][()], group["indices"][()], group["indptr"][()]), shape=shape)
            barcodes, ids = _strings(group["barcodes"]), _strings(group["features/id"])
            symbols = _strings(group["features/name"]) if "features/name" in group else [""] * len(ids)
            kinds = _strings(group["features/feature_type"]) if "features/feature_type" in group else [""] * len(ids)
    if matrix.shape != (len(ids), len(barcodes)):
        raise SourceError(
            f"{path}: the matrix is {matrix.shape}, but there are {len(ids)} features and {len(barcodes)} barcodes"
        )
    genes = [i for i, kind in enumerate(kinds) if kind in ("", "Gene Expression")]
    ids, symbols = [ids[i] for i in genes], [symbols[i] for i in genes]
    counts = as_counts(sparse.csr_matrix(matrix[genes].T), path, barcodes, ids)
    return counts, barcodes, ids, symbols


def _mex_file(folder: Path, name: str) -> Path:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise SourceError(f"{folder}: {name}.gz is not there")


def _lines(path: Path) -> list[str]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise SourceError(f"{path}: cannot be decompressed ({error}); is the file whole?") from error
    return raw.decode("utf-8").splitlines()


def _mex_features(folder: Path) -> pd.DataFrame:
    """Read features.tsv.gz (three columns) or the older genes.tsv (two)."""
    named = [n for n in ("features.tsv", "genes.tsv") if (folder / n).is_file() or (folder / f"{n}.gz").is_file()]
    if not named:
        raise SourceError(f"{folder}: neither features.tsv.gz nor genes.tsv is there")
    rows = [(line.split("\t") + ["", ""])[:3] for line in _lines(_mex_file(folder, named[0]))]
    return pd.DataFrame(rows, columns=["id", "symbol", "kind"])


def _align_suffix(spots: Spots, barcodes: list[str]) -> Spots:
    """Add or take the "-1" that one file writes after a barcode and the other does not."""
    dashed, wanted = "-" in spots.ids[0], "-" in barcodes[0] if barcodes else False
    if dashed == wanted or not barcodes:
        return spots
    suffix = "-" + barcodes[0].rsplit("-", 1)[1] if wanted else ""
    ids = [i + suffix if wanted else i.rsplit("-", 1)[0] for i in spots.ids]
    return Spots(ids, spots.xy, spots.array_xy, spots.labels, spots.in_tissue)
