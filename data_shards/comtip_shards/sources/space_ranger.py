"""Space Ranger ``outs`` folders of Visium slides, versions 1 to 4: h5 or MEX, positions with or without a header.

Positions are px of the microscope image that Space Ranger was given. That image is not part of the output, so the caller
states it with the option ``image``, unless the folder contains it under a usual name. The values ``hires`` and ``lowres`` select
the downscaled images in ``spatial/``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from comtip_shards.errors import SourceError
from comtip_shards.not_data import text_encoding
from comtip_shards.sections.facts import SectionFacts, SourceOptions
from comtip_shards.sections.section import Section, SectionMeta, check_unique
from comtip_shards.sources.base import SectionSource, check_one_file, pick
from comtip_shards.sources.files.opening import existing, reading
from comtip_shards.sources.files.packaging import find, read_packed, unpacked
from comtip_shards.sources.files.spots import SpotPositions, join
from comtip_shards.sources.files.tables import flags, numbers, with_point, without_blank
from comtip_shards.sources.tenx.features import for_species
from comtip_shards.sources.tenx.run import PICTURES, appearance_note, choose_image, scale_factors, section_name
from comtip_shards.sources.tenx.space_ranger_files import RENAMED_BINS, RunFiles, find_runs, has_bins, spatial_files

PITCH_UM, DIAMETER_UM = 100.0, 55.0
SLIDES = {4_992: "6.5 mm", 14_336: "11 mm"}
"""{number of spots: width of the capture area}."""
MAX_ROWS, MAX_BYTES = 1_000_000, 1 << 28
"""Maximum rows and bytes of a table of positions in Parquet."""
COARSE_MPP = 2.0
"""um per px above which the image of the positions is probably not a microscope scan."""
POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_ALSO_CALLED = {
    "tissue": "in_tissue",
    "row": "array_row",
    "col": "array_col",
    "imagerow": "pxl_row_in_fullres",
    "imagecol": "pxl_col_in_fullres",
}
"""{name of a column in Seurat: its name in :data:`COLUMNS`}."""
FACTORS = "scalefactors_json.json"
_BARCODE = re.compile(r"(?<![A-Za-z])[ACGTN]{14,}(?![A-Za-z])")
"""A barcode of 10x Genomics, between sample affixes that R and GEO add (``S1_AAAC...-1_2``)."""


def _head(path: Path) -> bytes:
    """Return the first 64 KiB of a file, because a wrong or hostile file may be very large."""
    with path.open("rb") as file:
        return file.read(1 << 16)


def recognise(path: Path) -> str | None:
    """Return a reason if ``path`` is a Space Ranger folder, else None."""
    if not path.is_dir() or (path / "binned_outputs").is_dir():
        return None
    found = spatial_files(path)
    factors = path / "spatial" / FACTORS
    if not found or (factors.is_file() and b"bin_size_um" in _head(factors)):
        return None  # Visium HD bins
    return f"{'spatial/ holds' if (path / 'spatial').is_dir() else 'found'} {', '.join(found[:4])}"


def open_sections(path: Path, samples: Sequence[str] | None, options: SourceOptions) -> list[SectionSource]:
    """Return the sections of the folder: one named after it, or one per prefix of the file names.

    Raises
    ------
    SourceError
        Files or facts are missing, or contradict each other.
    """
    runs = {run.name: run for run in find_runs(path)}
    names = pick(samples, list(runs), path)
    image = options.facts.image
    check_one_file("image", None if image in PICTURES else image, names, path)
    return [_source(runs[name], options.facts) for name in names]


def _source(run: RunFiles, facts: SectionFacts) -> SectionSource:
    path, notes, counts = run.root, list(run.notes), run.matrix
    if counts is None and path.name.lower() == "spatial":
        if has_bins(path):
            raise SourceError(f"{path.parent}: {RENAMED_BINS}")
        raise SourceError(
            f"{path}: the folder spatial/ has no counts; give the Space Ranger output folder above it, which has the count matrix"
        )
    if counts is None:
        raise SourceError(
            f"{path}: neither filtered_feature_bc_matrix.h5 nor filtered_feature_bc_matrix/matrix.mtx.gz exists; copy one of "
            f"them from the Space Ranger output{_renamed(path)}"
        )
    if not run.positions:
        raise SourceError(
            f"{path}: none of {', '.join(POSITIONS)} exists; copy one of them from the Space Ranger output"
        )
    positions, spots = _positions(run.positions)
    factors = scale_factors(run.factors) if run.factors is not None else {}
    if run.factors is None:
        notes.append(f"no {FACTORS}: the size of the image is not checked")
    full_mpp = _scale(spots, factors, positions, facts.mpp, notes)
    features, species = for_species(counts.features(), facts.species, counts.path)
    if facts.tissue is None:
        raise SourceError(f"{path}: Space Ranger does not state the tissue; set `tissue`")
    image, scale, image_notes = choose_image(path, run.pictures, factors, facts.image, run.name, run.prefix)
    notes += image_notes
    meta = SectionMeta(
        section_id=run.name,
        dataset=section_name(path),
        species=species,
        tissue=facts.tissue,
        donor=facts.donor or "",
        platform=facts.platform or "Visium",
        licence=facts.licence or "",
        attribution=facts.attribution or "",
        mpp=full_mpp / scale,
        spot_diameter_um=DIAMETER_UM,
        spot_pitch_um=PITCH_UM,
    )
    scaled = SpotPositions(spots.ids, spots.xy * scale, spots.array_xy, spots.labels, spots.in_tissue)

    def load() -> Section:
        tally: dict[str, int] = {}
        matrix, barcodes, genes = counts.read(features, tally)
        aligned = _align_barcodes(scaled, barcodes)
        plain = unpacked(image)
        all_notes = notes + features.others_note(tally) + appearance_note(plain)
        return join(meta, plain, matrix, barcodes, genes.ids, genes.symbols, aligned, counts.path, positions, all_notes)

    inputs = (image, *counts.files, positions, *([run.factors] if run.factors is not None else []))
    return SectionSource(meta, inputs, load)


def _renamed(path: Path) -> str:
    """Return advice to rename an HDF5 file, such as a second download (``filtered_feature_bc_matrix (1).h5``); "" if there is none."""
    found = find(path, "*.h5")
    return f", or rename {found[0].name} if it is this matrix" if found else ""


def _positions(tables: Sequence[Path]) -> tuple[Path, SpotPositions]:
    """Return the first table of positions and its spots; raises SourceError if a table in another format differs from it."""
    first = read_positions(tables[0])
    for other in tables[1:]:
        spots = read_positions(other)
        if spots.ids != first.ids or not np.allclose(spots.xy, first.xy, atol=1, equal_nan=True):
            raise SourceError(
                f"{tables[0].parent}: the tables of positions {tables[0].name} and {other.name} differ; remove the "
                "one that belongs to another run of Space Ranger"
            )
    return tables[0], first


def read_positions(path: Path) -> SpotPositions:
    """Read positions, in px of the full-resolution image, from csv, csv.gz or parquet, with or without a header.

    Raises
    ------
    SourceError
        The table cannot be read, has other columns, no rows, duplicate barcodes or invalid values, or has the barcodes of Visium
        HD bins.
    """
    existing(path, "table of positions")
    with reading(path, "tissue positions"):
        if ".parquet" in path.name.lower():
            table = _parquet(path)
        else:
            table = _text_table(path)
    if set(COLUMNS) <= set(table.columns):
        table = table[COLUMNS]
    elif table.shape[1] != len(COLUMNS) or "barcode" in table.columns:
        have = ", ".join(map(str, table.columns))
        raise SourceError(
            f"{path}: {table.shape[1]} columns ({have}), expected {', '.join(COLUMNS)}; copy the table from the Space Ranger output again"
        )
    else:
        table.columns = pd.Index(COLUMNS)
    if table.empty:
        raise SourceError(f"{path}: the table has no rows; copy it from the Space Ranger output again")
    if re.match(r"s_\d{3}um_", str(table["barcode"].iloc[0])):
        raise SourceError(
            f"{path}: the barcodes are bins of Visium HD; put the files into binned_outputs/square_016um/ (or 008um, 002um) "
            "with spatial/ inside, as Space Ranger writes them"
        )
    check_unique(table["barcode"].tolist(), f"{path}: barcodes")
    tissue = flags(table["in_tissue"], f"{path}: in_tissue")
    return SpotPositions(
        table["barcode"].tolist(),
        numbers(table, ["pxl_col_in_fullres", "pxl_row_in_fullres"], path),
        numbers(table, ["array_col", "array_row"], path),
        [""] * len(table),
        tissue,
    )


def _text_table(path: Path) -> pd.DataFrame:
    """Read a table of positions in text; column names of Seurat are replaced by the names in :data:`COLUMNS`."""
    raw = read_packed(path)
    try:
        text = raw.decode(text_encoding(raw))
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text ({error.reason}); save the table as UTF-8") from error
    first = text.partition("\n")[0].lower()
    # The file name does not tell whether there is a header: some tissue_positions_list.csv have one.
    header = "barcode" in first or "imagerow" in first
    sep = max(",;\t", key=first.count)  # spreadsheets write the separator of their language
    table = pd.read_csv(
        io.StringIO(text),
        sep=sep,
        header=0 if header else None,
        dtype=str,
        keep_default_na=False,
        skipinitialspace=True,
    )
    table = without_blank(table)
    if sep == ";":  # the comma is the decimal separator of these languages
        table = table.map(with_point)
    if header:
        names = [str(c).strip().lower() for c in table.columns]
        if "barcode" not in names and names[0].startswith("unnamed:"):
            names[0] = "barcode"  # row names of R
        table.columns = pd.Index([_ALSO_CALLED.get(n, n) for n in names])
    return table


def _parquet(path: Path) -> pd.DataFrame:
    """Read a table of positions in Parquet as text, after a check of its size, which may be a million times that of the file."""
    file = pq.ParquetFile(unpacked(path))
    size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
    if file.metadata.num_rows > MAX_ROWS or size > MAX_BYTES:
        raise SourceError(
            f"{path}: {file.metadata.num_rows:,} rows with {size:,} bytes in all, but a Visium slide has at most {max(SLIDES):,} spots; copy "
            "the table from the Space Ranger output again, or put bins of Visium HD into binned_outputs/"
        )
    return file.read().to_pandas().astype(str)


def _scale(
    spots: SpotPositions, factors: Mapping[str, float], path: Path, stated: float | None, notes: list[str]
) -> float:
    """Return um per full-resolution px: as stated by the caller or the scale factors, or else from the spot pitch of 100 um.

    Raises SourceError if a stated scale differs by more than 5 % from the scale that the pitch gives, or if the spot size
    contradicts the pitch.
    """
    if len(spots.ids) not in SLIDES:
        notes.append(
            f"{path.name} has {len(spots.ids):,} spots; a complete slide has {' or '.join(f'{n:,}' for n in SLIDES)}"
        )
    given = factors.get("microns_per_pixel") if stated is None else stated
    pitch = _pitch_px(spots, path)
    mpp = PITCH_UM / pitch
    notes.append(
        f"scale: {mpp:.4f} um per full-resolution px, from the {PITCH_UM:g} um spot pitch"
        if given is None
        else f"scale: {given:g} um per full-resolution px, as stated; the {PITCH_UM:g} um spot pitch gives {mpp:.4f}"
    )
    diameter = factors.get("spot_diameter_fullres")
    if diameter and not 0.7 < diameter * mpp / DIAMETER_UM < 1.5:
        raise SourceError(
            f"{path}: the spot pitch is {pitch:.1f} px but spot_diameter_fullres is {diameter:.1f} px; on a Visium slide "
            "these are 100 and 55 (or 65) um; use positions and scale factors of the same Space Ranger run"
        )
    if given is not None and not 0.95 < given / mpp < 1.05:
        fix = (
            "if the array is not Visium, give the section as .h5ad or SpatialData; otherwise remove microns_per_pixel from "
            "scalefactors_json.json"
            if stated is None
            else "omit `mpp`"
        )
        raise SourceError(
            f"{path}: {given:g} um per px is stated, but the spot pitch of {pitch:.1f} px (100 um) gives "
            f"{mpp:.4f} um per full-resolution px; {fix}, or use the matching table of positions"
        )
    if mpp > COARSE_MPP:
        notes.append(
            f"the positions belong to an image of {mpp:.2f} um per px, coarser than a microscope scan; probably the "
            "image of the CytAssist instrument was used"
        )
    return mpp if given is None else given


def _pitch_px(spots: SpotPositions, path: Path) -> float:
    """Return the spot pitch in px by a least-squares fit of positions to the hexagonal array."""
    # Neighbours in a row differ by two columns; the row distance is sqrt(3) / 2 of the pitch.
    array = spots.array_xy * [0.5, 0.75**0.5]
    design = np.column_stack([array - array.mean(axis=0), np.ones(len(array))])
    gaps = int((~np.isfinite(np.column_stack([array, spots.xy]))).any(axis=1).sum())
    if gaps or np.linalg.matrix_rank(design) < 3:
        problem = f"{gaps} spots without array coordinates or position" if gaps else "the spots are on one line"
        raise SourceError(
            f"{path}: {problem}, so the scale cannot be derived; copy the table from the Space Ranger output again"
        )
    fit, *_ = np.linalg.lstsq(design, spots.xy, rcond=None)
    pitch = float(np.sqrt(abs(np.linalg.det(fit[:2]))))
    off = float(np.sqrt(((design @ fit - spots.xy) ** 2).sum(axis=1).mean()))
    if not pitch > 0 or off > 0.2 * pitch:
        raise SourceError(
            f"{path}: positions differ by {off:.0f} px from a Visium array with the given array_row and array_col "
            f"(pitch {pitch:.0f} px); check that no columns are swapped and that this is a Visium slide"
        )
    return pitch


def _align_barcodes(spots: SpotPositions, barcodes: list[str]) -> SpotPositions:
    """Return the spots with barcodes spelled as in the counts, if only sample affixes such as "-1" or "S1_" differ."""
    if not barcodes or set(spots.ids) & set(barcodes):
        return spots
    full_name = {_core(b): b for b in barcodes}
    if len(full_name) < len(barcodes) or len({_core(i) for i in spots.ids}) < len(spots.ids):
        return spots  # aggregated runs: the affix is significant
    ids = [full_name.get(_core(i), i) for i in spots.ids]
    return SpotPositions(ids, spots.xy, spots.array_xy, spots.labels, spots.in_tissue)


def _core(barcode: str) -> str:
    """Return a barcode without sample affixes."""
    found = _BARCODE.search(barcode)
    return found[0] if found else re.sub(r"-\d+$", "", barcode)
