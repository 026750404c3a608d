"""All checks of one section, and of a whole source."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from comtip_shards.errors import SourceError
from comtip_shards.qc import counts, geometry, picture
from comtip_shards.qc.context import CELL, MAX_PATCHES, MAX_PICTURE_PX, PATCH_MPP, PATCH_PX, PICTURE_MPP, SectionContext
from comtip_shards.qc.page import overlay, pages, write_pages
from comtip_shards.qc.result import FAIL, Finding, SectionReport, explain
from comtip_shards.sections.section import Section
from comtip_shards.slides.base import Slide
from comtip_shards.slides.tiles import shrunk_size
from comtip_shards.sources.base import SectionSource

CHECKS: tuple[Callable[[SectionContext], Finding], ...] = (
    counts.join,
    counts.genes,
    counts.empty_spots,
    counts.repeated_spots,
    picture.stain,
    picture.blur,
    picture.background,
    geometry.on_tissue,
    geometry.scale,
    geometry.full_or_hires,
    geometry.orientation,
    geometry.corner,
)
"""In the order of a report."""
POSITIONS = ("full_or_hires", "orientation", "corner")
CAUSES = (
    ("stain", ("on_tissue", "background", "blur", *POSITIONS)),
    ("full_or_hires", ("scale", "on_tissue", "background", "orientation", "corner")),
    ("orientation", ("on_tissue", "background", "corner")),
    ("scale", ("corner",)),
    ("corner", ("on_tissue",)),
    ("on_tissue", ("background",)),
)
"""What follows from what: on positions that are mirrored, spots lie off tissue too."""


def check_section(section: Section, slide: Slide | None = None, *, tile_um: float = 224.0) -> SectionReport:
    """Make every check on a section that was read.

    Parameters
    ----------
    section
        As a source gives it.
    slide
        Its image, opened; None opens it here.
    tile_um
        Width of the tiles that will be cut, um.
    """
    if slide is None:
        with section.open_slide() as opened:
            return check_section(section, opened, tile_um=tile_um)
    look = build_context(section, slide, tile_um)
    findings = explain([check(look) for check in CHECKS], CAUSES)
    return SectionReport(section.meta.section_id, _facts(look), findings, section.spot_ids, overlay(look, findings))


def build_context(section: Section, slide: Slide, tile_um: float) -> SectionContext:
    """Read what the checks need of the image: a small picture of all of it, and some windows."""
    mpp = section.meta.mpp
    wanted = max(PICTURE_MPP, mpp * max(slide.size) / min(MAX_PICTURE_PX, max(slide.whole_size)))
    size, small_mpp, scale = shrunk_size(slide.size, mpp, wanted)
    none = np.zeros((0, PATCH_PX, PATCH_PX, 3), np.uint8)
    look = SectionContext(
        section, slide.shrunk(size), small_mpp, scale, none, tile_um, _scalefactors(section.image_path)
    )
    patch_mpp = max(PATCH_MPP, mpp)
    _, fine_mpp, fine_scale = shrunk_size(slide.size, mpp, patch_mpp)
    xy = np.floor(_patch_centres(look) / scale * fine_scale) / fine_scale  # whole px: nothing is resampled
    side = PATCH_PX
    if np.isfinite(slide.tile_limit_um):  # pixels at spots only, and no wider than ready-made patches
        xy, side = _evenly(section.xy, MAX_PATCHES), max(1, min(side, int(1.004 * slide.tile_limit_um / fine_mpp)))
    look.patches_NPP3 = slide.tiles(xy, mpp, side * fine_mpp, side, patch_mpp)
    return look


def _patch_centres(look: SectionContext) -> np.ndarray:
    """Return where to judge colour and sharpness, px of the picture: half at spots on tissue, half anywhere on tissue.

    Positions may be wrong, and tissue that no spot covers may be another stain; without tissue, any spot inside will do.
    """
    height, width = look.picture_HW3.shape[:2]
    cells = (np.argwhere(look.tissue)[:, ::-1] + 0.5) * CELL
    found = [_evenly(look.xy[look.on_tissue(look.xy)], MAX_PATCHES // 2), _evenly(cells, MAX_PATCHES // 2)]
    if not sum(map(len, found)):
        found = [_evenly(look.xy[((look.xy >= 0) & (look.xy < [width, height])).all(1)], MAX_PATCHES)]
    return np.concatenate(found)


def _evenly(rows: np.ndarray, n: int) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), n)).astype(int)]


def _scalefactors(image: Path) -> dict[str, float]:
    """Return the factors that Space Ranger wrote beside an image, so that a finding can name one."""
    for folder in (image.parent, image.parent / "spatial"):
        path = folder / "scalefactors_json.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return {}  # a reader that needs it says so
            return {
                k: float(v) for k, v in found.items() if k.endswith("scalef") and isinstance(v, (int, float)) and v > 0
            }
    return {}


def _facts(look: SectionContext) -> dict[str, Any]:
    meta = look.section.meta
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
        "spots": len(look.section.spot_ids),
        "genes": len(look.section.gene_ids),
        "counts": int(look.totals.sum()),
        "dropped_spots": dict(look.section.dropped),
        "notes": list(look.section.notes),
        "tile_um": look.tile_um,
    }


def check_source(source: SectionSource, *, tile_um: float = 224.0) -> SectionReport:
    """Read a section and check it; what cannot be read becomes the one finding of its report."""
    try:
        return check_section(source.read(), tile_um=tile_um)
    except SourceError as error:
        finding = Finding(name="read", status=FAIL, said=str(error), advice="mend the file that is named")
        return SectionReport(source.meta.section_id, {"dataset": source.meta.dataset}, [finding])


def check_sources(
    sources: Sequence[SectionSource], out: Path, *, tile_um: float = 224.0, progress: bool = False
) -> list[SectionReport]:
    """Check sections and write a page each, and ``index.html``, into ``out``.

    Parameters
    ----------
    sources
        From :func:`comtip_shards.sources.open_source`.
    out
        A new folder, or one that holds nothing but an earlier check's files.
    tile_um
        Width of the tiles that will be cut, um.
    progress
        Show a bar on a terminal.

    Raises
    ------
    SourceError
        ``out`` holds other files.
    """
    out = Path(out).resolve()  # the user may name a link; what is below it may be none
    if out.exists() and not out.is_dir():
        raise SourceError(f"{out} is a file; give a folder")
    foreign = _foreign(out) if out.exists() else []
    if foreign:
        raise SourceError(f"{out} holds other files ({', '.join(foreign[:3])}); give a new folder")
    bar = tqdm(sources, desc="checks", unit="section", disable=None if progress else True)
    reports = [check_source(s, tile_um=tile_um) for s in bar]
    write_pages([(r.section_id, pages(r), r.summary()) for r in reports], out)
    return reports


def _foreign(folder: Path) -> list[str]:
    """Return what in a folder was not written by a check: it writes pairs of .json and .html, and an index."""
    there = {p.name for p in folder.iterdir()}
    stems = {Path(n).stem for n in there if n.endswith(".json")} & {Path(n).stem for n in there if n.endswith(".html")}
    return sorted(
        n for n in there if n != "index.html" and not (n.endswith((".json", ".html")) and Path(n).stem in stems)
    )
