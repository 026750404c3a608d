"""Visium HD: bins of 2, 8 or 16 um, or segmented cells, pooled to square pseudo-spots.

Bins form a grid, which may be rotated relative to the image. A pseudo-spot is a square block of bins of this grid. Cells are
pooled in squares parallel to the image. Only bins in tissue are counted; blocks with too few of them are excluded and
reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import SourceOptions, refuse
from comtip_shards.sources.base import SectionSource, pick
from comtip_shards.sources.files.packaging import find
from comtip_shards.sources.tenx.run import section_name
from comtip_shards.sources.visium_hd_parts.bins import bins_source
from comtip_shards.sources.visium_hd_parts.cells import cells_source
from comtip_shards.sources.visium_hd_parts.files import BIN_FOLDER, find_bins

POOL_UM = 128.0
"""Default width of a pseudo-spot in um."""


def recognise(path: Path) -> str | None:
    """Return a reason if ``path`` is a Visium HD folder, else None."""
    bins = find_bins(path)
    if bins:
        return f"bins of Visium HD in {', '.join(p.name for p in bins.values())}"
    cells = bool(find(path / "segmented_outputs", "*filtered_feature_cell_matrix*"))
    return "segmented cells of Visium HD in segmented_outputs" if cells else None


def open_sections(path: Path, samples: Sequence[str] | None, options: SourceOptions) -> list[SectionSource]:
    """Return the only section of the folder, named after it; raises SourceError if files, facts or options do not fit."""
    path = path.resolve()
    root = path.parents[1] if BIN_FOLDER.fullmatch(path.name) and path.parent.name == "binned_outputs" else path
    pick(samples, [section_name(root)], path)
    refuse(options, ("qv", "alignment"), "it is for Xenium")
    bins = find_bins(path)
    what = options.pooling.pool_from or ("bins" if bins else "cells")
    if what not in ("bins", "cells"):
        raise SourceError(f"`pool_from={what}` is for Xenium; use bins or cells for Visium HD")
    pool_um = options.pooling.pool_um or POOL_UM
    if what == "cells":
        return [cells_source(root, pool_um, bins, options)]
    if not bins:
        raise SourceError(
            f"{path}: no binned_outputs/square_016um, 008um or 002um with spatial/tissue_positions.parquet; copy one from the Space Ranger "
            "output, or set `pool_from` to cells"
        )
    return [bins_source(root, pool_um, bins, options)]
