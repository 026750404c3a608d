"""File search in a Xenium output folder with one run, or several with prefixes; the H&E image and its alignment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import PoolingOptions, SectionFacts
from comtip_shards.sources.base import stated_file
from comtip_shards.sources.files.names import by_section_id, safe_id
from comtip_shards.sources.files.opening import existing
from comtip_shards.sources.files.packaging import by_prefix, find
from comtip_shards.sources.tenx.matrix import TenxMatrix
from comtip_shards.sources.tenx.run import find_matrices, only, section_name

EXPERIMENT, TRANSCRIPTS, CELLS, PANEL = "experiment.xenium", "transcripts.parquet", "cells.parquet", "gene_panel.json"
ROLES = {
    "experiment": r"experiment\.xenium",
    "transcripts": r"transcripts\.(?:parquet|csv)",
    "cells": r"cells\.(?:parquet|csv)",
    "panel": r"gene_panel\.json",
}
_HE = ("*he_image.ome.tif*", "*he_image.tif*", "*he_image.btf*")
_ALIGNED = ("*he_imagealignment.csv*", "*he_image_alignment.csv*", "*alignment.csv*", "*keypoints.csv*")


@dataclass
class XeniumFiles:
    """Files of one section, None if missing; names may have a prefix (``Xenium_V1_Breast_experiment.xenium``)."""

    name: str
    """Section id."""
    root: Path
    """The searched folder."""
    prefix: str = ""
    """Prefix of the file names if the folder contains several sections."""
    experiment: Path | None = None
    transcripts: Path | None = None
    cells: Path | None = None
    panel: Path | None = None
    matrix: TenxMatrix | None = None


def find_runs(path: Path) -> list[XeniumFiles]:
    """Return the runs of a folder: one, or one per prefix of the file names; raises SourceError if a file is ambiguous."""
    found = {role: by_prefix(path, like) for role, like in ROLES.items()}
    matrices = find_matrices(path, "cell_feature_matrix")
    prefixes = sorted(found["experiment"] or found["transcripts"] or found["cells"])
    if len(prefixes) <= 1:
        files = {
            role: _preferred([p for group in groups.values() for p in group], role) for role, groups in found.items()
        }
        only([m.path for m in matrices.values()], "cell_feature_matrix")
        return [XeniumFiles(section_name(path), path, "", **files, matrix=next(iter(matrices.values()), None))]
    return [
        XeniumFiles(
            safe_id(prefix),
            path,
            prefix,
            **{role: _preferred(groups.get(prefix, []), role) for role, groups in found.items()},
            matrix=matrices.get(prefix),
        )
        for prefix in by_section_id(prefixes, "prefixes", path).values()
    ]


def _preferred(files: Sequence[Path], what: str) -> Path | None:
    """Return the preferred form of one file (Parquet, else uncompressed), or None; raises SourceError if it is ambiguous."""
    parquet = [p for p in files if ".parquet" in p.name.lower()]
    plain = [p for p in files if not p.name.lower().endswith(".gz")]
    return only(parquet or plain or files, f"file of {what}")


def he_image(files: XeniumFiles, facts: SectionFacts) -> Path:
    """Return the H&E image: the stated one, or the only one in the folder; raises SourceError otherwise."""
    image = stated_file(facts.image, files.name) or _find(files, _HE, "H&E image (select one with `image`)")
    if image is None:
        raise SourceError(
            f"{files.root}: no H&E image (*he_image.ome.tif), and the morphology images of a Xenium are fluorescence; set "
            "`image` to the H&E image of the section and `alignment` to its alignment"
        )
    return existing(image, "H&E image (`image`)")


def alignment_file(files: XeniumFiles, image: Path, pooling: PoolingOptions) -> Path:
    """Return the alignment: the stated one, else the one named after the image, else the only one in the folder.

    Raises
    ------
    SourceError
        There is none, or more than one.
    """
    stated = stated_file(pooling.alignment, files.name)
    sibling = image.with_name(re.sub(r"(\.ome)?\.\w+$", "", image.name.removesuffix(".gz")) + "alignment.csv")
    file = stated or (sibling if sibling.is_file() else None)
    file = file or _find(files, _ALIGNED, "alignment (select one with `alignment`)")
    if file is None:
        raise SourceError(
            f"{files.root}: no alignment of {image.name} to the DAPI image (*he_imagealignment.csv); align them in Xenium "
            "Explorer, export the matrix or the keypoints as csv, and set `alignment`"
        )
    return file


def _find(files: XeniumFiles, patterns: Sequence[str], what: str) -> Path | None:
    for pattern in patterns:
        found = only([p for p in find(files.root, pattern) if p.name.startswith(files.prefix)], what)
        if found is not None:
            return found
    return None
