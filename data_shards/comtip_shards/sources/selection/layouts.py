"""File name patterns of each format, used to select the files of a remote source."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from comtip_shards.sections.facts import SourceOptions
from comtip_shards.sources import hest, manifest_table, stimage
from comtip_shards.sources.base import CatalogueRow
from comtip_shards.sources.files.names import safe_id
from comtip_shards.sources.visium_hd import POOL_UM

_MICROSCOPE = ("microscope_image/*", "*tissue_image.*", "*_image.tif*", "*_image.btf", "*_image.jpg")
HD_BINS = (16, 8, 2)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """File name patterns of one format, relative to the source; ``{id}`` is replaced by the section."""

    fmt: str
    marks: tuple[str, ...]
    """Patterns that must all match; the files of the first are passed to :attr:`names`."""
    files: Callable[[Path, str, SourceOptions], tuple[str, ...]]
    """``files(local root, section, options)`` returns the patterns of a section's files."""
    tables: tuple[str, ...] = ()
    """Metadata tables, downloaded first."""
    names: Callable[[Path, Collection[str]], list[str]] | None = None
    """Returns the sections as spelled in file names; None if file names do not identify sections, so that all files are needed."""
    rows: Callable[[Path], list[CatalogueRow]] | None = None
    """Returns section metadata from the tables."""
    section: Callable[[str], str] = str
    """Converts the spelling in file names to a section id."""


def _fixed(*patterns: str) -> Callable[[Path, str, SourceOptions], tuple[str, ...]]:
    return lambda root, section, options: patterns


def _stems(suffix: str) -> Callable[[Path, Collection[str]], list[str]]:
    return lambda root, names: sorted(PurePosixPath(n).name.removesuffix(suffix) for n in names)


def _hest_files(root: Path, section: str, options: SourceOptions) -> tuple[str, ...]:
    pixels = "patches/{id}.h5" if options.facts.pixels == "patches" else "wsis/{id}.tif*"
    return ("st/{id}.h5ad", "metadata/{id}.json", pixels)


def _manifest_files(root: Path, section: str, options: SourceOptions) -> tuple[str, ...]:
    return manifest_table.files_of(root, section)


def _hd_files(root: Path, section: str, options: SourceOptions) -> tuple[str, ...]:
    """Return the file patterns, with bins of one width only: those of 2 um are about 100 times larger than the rest."""
    pool = options.pooling.pool_um or POOL_UM
    width = options.pooling.bin_um or next((b for b in HD_BINS if pool % b == 0), HD_BINS[-1])
    bins = f"binned_outputs/square_{int(width):03d}um"
    return (
        f"{bins}/*_feature_bc_matrix.h5",
        f"{bins}/filtered_feature_bc_matrix/*",
        f"{bins}/spatial/*",
        "segmented_outputs/*.h5",
        "segmented_outputs/*.geojson",
        "segmented_outputs/spatial/*",
        "spatial/*",
        *_MICROSCOPE,
    )


_ALL = (
    Layout(
        fmt="manifest",
        marks=("manifest.tsv",),
        tables=("manifest.tsv",),
        files=_manifest_files,
        names=lambda root, names: manifest_table.ids_of(root),
        rows=manifest_table.catalogue,
    ),
    Layout(
        fmt="hest",
        marks=("st/*.h5ad",),
        tables=(hest.TABLE,),
        files=_hest_files,
        names=_stems(".h5ad"),
        rows=hest.table_rows,
    ),
    Layout(
        fmt="stimage",
        marks=("*/coord/*_coord.csv",),
        tables=(stimage.TABLE,),
        files=_fixed("*/coord/{id}_coord.csv", "*/gene_exp/{id}_count.csv", "*/image/{id}.*"),
        names=_stems("_coord.csv"),
        rows=stimage.table_rows,
        section=safe_id,
    ),
    Layout(fmt="visium_hd", marks=("binned_outputs/*/spatial/tissue_positions.parquet",), files=_hd_files),
    Layout(
        fmt="xenium",
        marks=("*experiment.xenium",),
        files=_fixed(
            "*experiment.xenium",
            "*transcripts.parquet",
            "*cells.parquet",
            "*cell_feature_matrix.h5",
            "*gene_panel.json",
            "*he_image*",
            "*alignment.csv",
            "*keypoints.csv",
        ),
    ),
    Layout(
        fmt="space_ranger",
        marks=("spatial/*tissue_positions*",),
        files=_fixed(
            "spatial/*",
            "*filtered_feature_bc_matrix.h5",
            "*filtered_feature_bc_matrix/*",
            "filtered_gene_bc_matrices/*/*",
            *_MICROSCOPE,
        ),
    ),
    Layout(fmt="spatialdata", marks=("tables/*/*", "images/*/*"), files=_fixed("**")),
    Layout(
        fmt="anndata",
        marks=("*.h5ad",),
        files=_fixed("{id}.h5ad"),
        names=_stems(".h5ad"),
        section=safe_id,
    ),
    Layout(fmt="legacy_st", marks=("*.tsv.gz", "*_HE.*"), files=_fixed("*")),
)
LAYOUTS = {layout.fmt: layout for layout in _ALL}
"""{format: layout}, in the order in which formats are tried."""
