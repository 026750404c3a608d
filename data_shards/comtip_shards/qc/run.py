"""Run all checks on a section or on all sections of a source."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comtip_shards.errors import SourceError
from comtip_shards.progress import Progress
from comtip_shards.qc import counts, geometry, picture
from comtip_shards.qc.context import CELL, MAX_PATCHES, MAX_PICTURE_PX, PATCH_MPP, PATCH_PX, PICTURE_MPP, SectionContext
from comtip_shards.qc.page import COUNTS_PER_SPOT, counts_per_spot, overlay, pages, write_pages
from comtip_shards.qc.result import FAIL, Finding, SectionReport, explain
from comtip_shards.sections.section import Section
from comtip_shards.slides.base import Slide
from comtip_shards.slides.tiles import FIELD_UM, check_tile_um, shrunk_size
from comtip_shards.sources.base import SectionSource

CHECKS: tuple[Callable[[SectionContext], Finding], ...] = (
    counts.join,
    counts.genes,
    counts.empty_spots,
    counts.repeated_spots,
    counts.equal_totals,
    picture.stain,
    picture.blur,
    picture.background,
    geometry.on_tissue,
    geometry.scale,
    geometry.full_or_hires,
    geometry.orientation,
    geometry.corner,
)
"""All checks, in the order of a report."""
POSITIONS = ("full_or_hires", "orientation", "corner")
CAUSES = (
    ("stain", ("on_tissue", "background", "blur", *POSITIONS)),
    ("full_or_hires", ("scale", "on_tissue", "background", "orientation", "corner")),
    ("orientation", ("on_tissue", "background", "corner")),
    ("scale", ("corner",)),
    ("corner", ("on_tissue",)),
)
"""(check, checks that fail because of it), for :func:`explain`: mirrored positions, for example, put spots off tissue."""


def check_section(section: Section, slide: Slide | None = None, *, tile_um: float = FIELD_UM) -> SectionReport:
    """Run all checks on a section.

    Parameters
    ----------
    section
        The section as returned by a source.
    slide
        The image of the section, already open; None to open it here.
    tile_um
        Width in um of the tiles to be cut; by default that of a build (112).

    Raises
    ------
    SourceError
        The image cannot be opened or decoded, or the counts of one key in a spot exceed int32.
    """
    if slide is None:
        with section.open_slide() as opened:
            return check_section(section, opened, tile_um=tile_um)
    context = build_context(section, slide, tile_um)
    findings = explain([check(context) for check in CHECKS], CAUSES)
    return SectionReport(
        section.meta.section_id, _facts(context), findings, section.spot_ids, overlay(context, findings)
    )


def build_context(section: Section, slide: Slide, tile_um: float) -> SectionContext:
    """Read the image data for the checks: a downsampled image and some patches."""
    mpp = section.meta.mpp
    wanted = max(PICTURE_MPP, mpp * max(slide.size) / min(MAX_PICTURE_PX, max(slide.whole_size)))
    size, small_mpp, scale = shrunk_size(slide.size, mpp, wanted)
    none = np.zeros((0, PATCH_PX, PATCH_PX, 3), np.uint8)
    context = SectionContext(
        section,
        slide.shrunk(size),
        small_mpp,
        scale,
        none,
        np.zeros((0, 2)),
        tile_um,
        _scalefactors(section.image_path),
    )
    patch_mpp = max(PATCH_MPP, mpp)
    _, fine_mpp, fine_scale = shrunk_size(slide.size, mpp, patch_mpp)
    xy = np.floor(_patch_centres(context) / scale * fine_scale) / fine_scale  # integer px, so that nothing is resampled
    side = PATCH_PX
    if np.isfinite(slide.tile_limit_um):  # only precomputed patches at the spots are available
        xy, side = _evenly(section.xy, MAX_PATCHES), max(1, min(side, int(1.004 * slide.tile_limit_um / fine_mpp)))
    context.patch_xy = xy * scale
    context.patches_NPP3 = slide.tiles(xy, mpp, side * fine_mpp, side, patch_mpp)
    return context


def _patch_centres(context: SectionContext) -> np.ndarray:
    """Return centres of patches for colour and sharpness, px of the downsampled image.

    Half of them are spots on tissue. The other half are anywhere on tissue, because positions may be wrong, and tissue without
    spots may have another stain. In an image without tissue, spots inside the image are used.
    """
    height, width = context.picture_HW3.shape[:2]
    cells = (np.argwhere(context.tissue)[:, ::-1] + 0.5) * CELL
    found = [_evenly(context.xy[context.on_tissue(context.xy)], MAX_PATCHES // 2), _evenly(cells, MAX_PATCHES // 2)]
    if not sum(map(len, found)):
        found = [_evenly(context.xy[((context.xy >= 0) & (context.xy < [width, height])).all(1)], MAX_PATCHES)]
    return np.concatenate(found)


def _evenly(rows: np.ndarray, n: int) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), n)).astype(int)]


def _scalefactors(image: Path) -> dict[str, float]:
    """Return the scale factors that Space Ranger wrote next to an image, empty if there are none or they cannot be read."""
    for folder in (image.parent, image.parent / "spatial"):
        path = folder / "scalefactors_json.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                return {}  # a reader that needs the file reports the error
            items = found.items() if isinstance(found, dict) else ()
            return {k: float(v) for k, v in items if k.endswith("scalef") and isinstance(v, (int, float)) and v > 0}
    return {}


def _facts(context: SectionContext) -> dict[str, Any]:
    meta = context.section.meta
    names = (
        "dataset",
        "species",
        "tissue",
        "donor",
        "platform",
        "split",
        "licence",
        "mpp",
        "spot_diameter_um",
        "spot_pitch_um",
    )
    facts = {n: getattr(meta, n) for n in names}
    facts = {n: None if isinstance(v, float) and not np.isfinite(v) else v for n, v in facts.items()}
    return facts | {
        "spots": len(context.section.spot_ids),
        "genes": len(context.section.gene_ids),
        "counts": int(context.totals.sum()),
        COUNTS_PER_SPOT: counts_per_spot(context.totals),
        "dropped_spots": dict(context.section.dropped),
        "notes": list(context.section.notes),
        "tile_um": context.tile_um,
    }


def check_source(source: SectionSource, *, tile_um: float = FIELD_UM) -> SectionReport:
    """Read and check a section; if it cannot be read, the error is the only finding of the report."""
    try:
        return check_section(source.read(), tile_um=tile_um)
    except SourceError as error:
        finding = Finding(name="read", status=FAIL, message=str(error), advice="do what the message says")
        return SectionReport(source.meta.section_id, {"dataset": source.meta.dataset}, [finding])


def check_sources(
    sources: Sequence[SectionSource], out: Path, *, tile_um: float = FIELD_UM, progress: bool = False
) -> list[SectionReport]:
    """Check sections, and write one page for each and ``index.html`` to ``out``.

    Parameters
    ----------
    sources
        Sections, from :func:`comtip_shards.sources.open_source`.
    out
        A new folder, or one that contains only files of an earlier check.
    tile_um
        Width in um of the tiles to be cut; by default that of a build (112).
    progress
        Show a progress bar on a terminal, or log the progress without one.

    Raises
    ------
    SourceError
        ``out`` is a file, or holds other files, or ``tile_um`` is out of range.
    """
    check_tile_um(tile_um)
    out = Path(out).resolve()  # the folder itself may be a link; files below it must not be
    if out.exists() and not out.is_dir():
        raise SourceError(f"{out} is a file; give a folder")
    foreign = _foreign(out) if out.exists() else []
    if foreign:
        raise SourceError(f"{out} contains other files ({', '.join(foreign[:3])}); give a new folder")
    reports = []
    with Progress("checks", len(sources), unit="section", show=progress) as bar:
        for source in sources:
            reports.append(check_source(source, tile_um=tile_um))
            bar.update()
    write_pages([(r.section_id, pages(r), r.summary()) for r in reports], out)
    return reports


def _foreign(folder: Path) -> list[str]:
    """Return the names in a folder that no check writes; a check writes pairs of .json and .html, and ``index.html``."""
    names = {p.name for p in folder.iterdir()}
    stems = {Path(n).stem for n in names if n.endswith(".json")} & {Path(n).stem for n in names if n.endswith(".html")}
    return sorted(
        n for n in names if n != "index.html" and not (n.endswith((".json", ".html")) and Path(n).stem in stems)
    )
