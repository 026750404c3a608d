"""Error messages for paths that no reader accepts: archives, files that are not data, and incomplete known layouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comtip_shards.not_data import OME_TIFF, archive_kind, not_data
from comtip_shards.slides.open import is_image
from comtip_shards.sources.base import Reader
from comtip_shards.sources.files.packaging import contents, is_gzip
from comtip_shards.sources.legacy_st import without_images
from comtip_shards.sources.tenx.space_ranger_files import RENAMED_BINS, has_bins

MAX_FILES = 200
MICROSCOPE = f"a microscope's own format, which cannot be read; convert it to {OME_TIFF}"
SPREADSHEET = "a workbook of a spreadsheet, which cannot be read; save the table as csv"
UNFINISHED = "a download that did not end; download the file again"
SHORTCUT = "a shortcut to a web page, not the file itself; open the page and download the file"
_SUFFIXES = {
    ".rds": "R objects cannot be read; write the object as .h5ad (zellkonverter::writeH5AD)",
    ".rdata": "R objects cannot be read; write the object as .h5ad (zellkonverter::writeH5AD)",
    ".h5seurat": "h5Seurat cannot be read; write the object as .h5ad (zellkonverter::writeH5AD, or SeuratDisk::Convert)",
    ".loom": "loom files have no image and no positions in px; write the object as .h5ad with obsm['spatial']",
    ".vsi": MICROSCOPE,
    ".lif": MICROSCOPE,
    ".nd2": MICROSCOPE,
    ".oir": MICROSCOPE,
    ".ims": MICROSCOPE,
    **dict.fromkeys((".xlsx", ".xls", ".ods"), SPREADSHEET),
    **dict.fromkeys((".crdownload", ".part", ".partial", ".download", ".aria2"), UNFINISHED),
    **dict.fromkeys((".url", ".webloc"), SHORTCUT),
    ".dvc": "a DVC pointer, not the file itself; run dvc pull",
    ".gef": "Stereo-seq .gef cannot be read; write bins with positions as .h5ad (stereopy)",
}
_PARTS = (
    (
        "feature_bc_matrix",
        "a count matrix without positions; put spatial/ (tissue_positions.csv, scalefactors_json.json) next to it, and give the folder",
    ),
    (
        "cell_feature_matrix",
        "a count matrix without positions; put experiment.xenium and transcripts or cells (.parquet) next to it, and give the folder",
    ),
    (
        "matrix.mtx",
        "a count matrix without positions; put spatial/ (tissue_positions.csv, scalefactors_json.json) next to it, and give the folder",
    ),
)

_ARCHIVES = (
    ".tar",
    ".tgz",
    ".zip",
    ".7z",
    ".rar",
    ".tbz2",
    ".txz",
    *(f".tar.{kind}" for kind in ("gz", "bz2", "xz", "zst")),
)
_OF_RUNS = (
    "feature_bc_matrix",
    "cell_feature_matrix",
    "experiment.xenium",
    "matrix.mtx",
    "tissue_positions",
    "scalefactors",
)
"""Parts of the names of files that are read together with other files of their folder."""


def explain(path: Path, readers: Sequence[Reader]) -> str:
    """Return a message with the problem of a path that no reader accepts, and the fix.

    Parameters
    ----------
    path
        An existing file or folder.
    readers
        All readers, whose layouts are listed if nothing more specific is known.
    """
    special = _of_file(path, readers) if path.is_file() else _of_folder(path, readers)
    if special:
        return special
    known = "; ".join(f"{r.name}: {r.looks_for}" for r in readers)
    if path.is_dir() and not contents(path):
        return f"the folder is empty, so it has no known format; give the folder that contains the data. Looked for {known}"
    return f"no known format. Looked for {known}. If it is one of these, set `fmt` to it"


def _of_file(path: Path, readers: Sequence[Reader]) -> str | None:
    reason = not_data(path) or _SUFFIXES.get(path.suffix.lower())
    if reason:
        return reason
    folder = path.resolve().parent
    folder = folder.parent if folder.name == "spatial" else folder
    if any(part in path.name for part in _OF_RUNS) and any(r.recognise(folder) for r in readers):
        return f"one file of a source; give its folder, {folder}"
    if is_image(path):
        return (
            "an image alone, without spots and counts; give the source that has them and state the image as `image`, or "
            "predict on the image with `comtip predict`"
        )
    kind = archive_kind(path)
    if kind and not (is_gzip(path) and path.name.lower().endswith(".h5ad.gz")):
        return kind
    if path.suffix.lower() in (".csv", ".txt") and b"sample_id" in _first_line(path):
        return "a table with a column sample_id; save it separated by tabs as manifest.tsv"
    return next((text for part, text in _PARTS if part in path.name), None)


def _first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline(1 << 16).replace(b"\0", b"")  # UTF-16


def _of_folder(path: Path, readers: Sequence[Reader]) -> str | None:
    entries = contents(path)[:MAX_FILES]
    if has_bins(path / "spatial"):
        return RENAMED_BINS
    parts = [p for p in entries if p.is_dir() and p.name != "spatial"]  # spatial/ alone has no counts
    runs = {p.name: r.name for p in parts for r in readers if r.recognise(p)}
    if runs:
        listed = ", ".join(f"{name} ({fmt})" for name, fmt in list(runs.items())[:8])
        return (
            f"the folder is not a source, but contains sources: {listed}; give one of them or, to build one set from several, a table of "
            "them (csv with a column path, one row per source)"
        )
    files = [p for p in entries if p.is_file()]
    for file in files:
        reason = not_data(file)
        if reason and file.suffix.lower() not in (".txt", ".md"):
            return f"{file.name}: {reason}"
    tables = [p for p in files if p.suffix.lower() in (".csv", ".txt") and b"sample_id" in _first_line(p)]
    if tables:
        return f"{tables[0].name}: a table with a column sample_id; save it separated by tabs as manifest.tsv"
    archives = [p for p in files if p.name.lower().endswith(_ARCHIVES)]
    if archives:
        return f"{archives[0].name} is an archive; unpack it into this folder first"
    for file in files:
        if file.suffix.lower() in _SUFFIXES:
            return f"{file.name}: {_SUFFIXES[file.suffix.lower()]}"
    counts = without_images(path)
    if counts:
        return (
            f"count tables without images: {', '.join(counts[:8])}; put the H&E image of each next to it, as {counts[0]}_HE.jpg. Without "
            "images, counts serve for gene vectors only (`comtip genes vectors`)"
        )
    return next((f"{e.name}: {text}" for e in entries for part, text in _PARTS if part in e.name), None)
