"""Staging: cut and encode one section, before the gene table of the complete set is known."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from scipy import sparse

from comtip_shards.builder.output_dir import WRITING
from comtip_shards.builder.writer import RecordRun, SectionHead, layout
from comtip_shards.format.manifest import TileSpec
from comtip_shards.format.record import encode_json, encode_tile
from comtip_shards.genes.identifiers import GeneMap, map_genes
from comtip_shards.qc.page import EXTENSIONS, pages
from comtip_shards.qc.result import SectionReport
from comtip_shards.qc.run import check_section
from comtip_shards.sections.duplicates import section_fingerprint
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.slides.base import Slide, reading_order
from comtip_shards.slides.tiles import StainStats, stain_stats
from comtip_shards.sources.base import SectionSource
from comtip_shards.storage.atomic import atomic_folder

OVERVIEW_PX = 1024
"""Maximum width and height of an overview."""


@dataclass(frozen=True)
class StagedSection:
    """A folder written by :func:`stage_section`; its rows are in the order of the source."""

    folder: Path
    meta: SectionMeta
    fingerprint: str

    def head(self) -> SectionHead:
        """Return everything except the records."""
        facts = json.loads((self.folder / "facts.json").read_bytes())
        stain = StainStats(tuple(facts["stain"]["od_mean"]), tuple(facts["stain"]["od_std"]))
        return SectionHead(
            self.meta,
            self.fingerprint,
            facts["n_spots"],
            facts["keys"],
            stain,
            (self.folder / "overview.jpg").read_bytes(),
            facts["overview_mpp"],
            facts["source"],
            {e: (self.folder / f"report.{e}").read_text(encoding="utf-8") for e in EXTENSIONS},
        )

    def runs(self, size: int) -> Iterator[RecordRun]:
        """Yield the records in the order of the layout, ``size`` at a time; tiles are memory-mapped."""
        spots = json.loads((self.folder / "spots.json").read_bytes())
        order = layout(self.meta.section_id, len(spots))
        tiles = np.memmap(self.folder / "tiles.bin", np.uint8, "r")
        with np.load(self.folder / "counts.npz", allow_pickle=False) as arrays:
            indptr, columns, counts = (arrays[k] for k in ("indptr", "columns", "counts"))
            starts, sizes = arrays["starts"], arrays["sizes"]
        for start in range(0, order.size, size):
            rows = order[start : start + size]
            spans = [slice(indptr[r], indptr[r + 1]) for r in rows]
            yield RecordRun(
                tiles=[tiles[starts[r] : starts[r] + sizes[r]].tobytes() for r in rows],
                jsons=[encode_json(spots[r]) for r in rows],
                indptr=np.concatenate([[0], np.cumsum(indptr[rows + 1] - indptr[rows])]),
                columns=np.concatenate([columns[s] for s in spans]),
                counts=np.concatenate([counts[s] for s in spans]),
            )


def stage_section(
    source: SectionSource, meta: SectionMeta, tile: TileSpec, fingerprint: str, staging: Path
) -> StagedSection:
    """Read, cut and encode one section, unless it was already staged from the same inputs.

    Parameters
    ----------
    source
        The section to read.
    meta
        Metadata of the section, with the donor and the split that the set will state.
    tile
        Settings of the tiles.
    fingerprint
        Hash of the section's inputs and settings.
    staging
        The staging folder.

    Raises
    ------
    SourceError
        The section cannot be read or checked, or its counts exceed int32.
    """
    folder = staging / f"{meta.section_id}-{fingerprint[:16]}"
    if folder.is_dir():
        return StagedSection(folder, meta, fingerprint)  # renamed after writing, so an existing folder is complete
    section = source.read()
    with atomic_folder(folder, staging / f"{folder.name}.{os.getpid()}{WRITING}", keep_existing=True) as tmp_path:
        tmp_path.mkdir()
        _write_section(section, meta, tile, tmp_path)
    return StagedSection(folder, meta, fingerprint)


def _write_section(section: Section, meta: SectionMeta, tile: TileSpec, folder: Path) -> None:
    """Cut, check and encode a section, and write the files that :class:`StagedSection` reads."""
    with section.open_slide() as slide, (folder / "tiles.bin").open("wb") as file:
        stain, starts, sizes = _write_tiles(section, slide, tile, file)
        overview, overview_mpp = _overview(slide, meta.mpp)
        checked = check_section(replace(section, meta=meta), slide, tile_um=tile.um)
        notes = [*section.notes, *slide.notes, *_notes(meta, tile), *checked.lines]
    genes = map_genes(section.gene_ids, meta.species, symbols=section.gene_symbols)
    counts = genes.sum_columns(section.counts, f"section {meta.section_id}")
    np.savez(
        folder / "counts.npz",
        indptr=counts.indptr.astype(np.int64),
        columns=counts.indices.astype(np.int32),
        counts=counts.data.astype(np.int32),
        starts=starts,
        sizes=sizes,
    )
    (folder / "overview.jpg").write_bytes(overview)
    for extension, page in pages(checked).items():
        (folder / f"report.{extension}").write_text(page, encoding="utf-8")
    facts = {
        "n_spots": len(section.spot_ids),
        "keys": genes.keys,
        "overview_mpp": overview_mpp,
        "stain": asdict(stain),
        "source": _source(section, genes, counts, checked, notes, overview),
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    spots = [_spot(section, meta, i) for i in range(len(section.spot_ids))]
    (folder / "spots.json").write_text(json.dumps(spots), encoding="utf-8")


def _source(
    section: Section,
    genes: GeneMap,
    counts: sparse.csr_matrix,
    checked: SectionReport,
    notes: list[str],
    overview: bytes,
) -> dict[str, Any]:
    """Return ``ManifestSection.source``: statistics of the build, results of the checks and the fingerprint."""
    kept, total = int(counts.sum(dtype=np.int64)), int(section.counts.sum(dtype=np.int64))
    return {
        "dropped_spots": section.dropped,
        "genes": genes.report(),
        "notes": notes,
        "unmapped_genes": len(genes.unmapped),
        "summed_genes": len(genes.collisions),
        "counts_left_out": total - kept,
        "checks": checked.summary(),
        "print": section_fingerprint(counts, genes.keys, np.asarray(Image.open(io.BytesIO(overview)))),
    }


def _write_tiles(
    section: Section, slide: Slide, tile: TileSpec, file: BinaryIO
) -> tuple[StainStats, np.ndarray, np.ndarray]:
    """Cut, measure, encode and write tiles one by one.

    Returns
    -------
    stain, starts, sizes
        Stain statistics; offset and size in ``file`` of each spot's tile, int64 (n,).
    """
    order = reading_order(section.xy, tile.um / section.meta.mpp)
    starts, sizes = np.zeros((2, order.size), np.int64)

    def tiles() -> Iterator[np.ndarray]:
        cut = slide.iter_tiles(section.xy[order], section.meta.mpp, tile.um, tile.px, tile.min_mpp)
        for row, one in zip(order, cut, strict=True):
            starts[row] = file.tell()
            sizes[row] = file.write(encode_tile(one, tile.codec, tile.quality))
            yield one

    return stain_stats(tiles()), starts, sizes


def _notes(meta: SectionMeta, tile: TileSpec) -> list[str]:
    notes = []
    if meta.mpp > tile.min_mpp * 1.05:
        notes.append(
            f"the image has {meta.mpp:.2f} um per px, coarser than the {tile.min_mpp:g} of the set: its tiles may be blurred"
        )
    if meta.donor.startswith("unstated:"):
        notes.append("the donor is not stated: the section counts as a donor of its own")
    return notes


def _spot(section: Section, meta: SectionMeta, i: int) -> dict[str, Any]:
    xy, array = section.xy[i], section.array_xy[i]
    out: dict[str, Any] = {
        "section_id": meta.section_id,
        "spot_id": section.spot_ids[i],
        "source_row": i,
        "x_px": round(float(xy[0]), 3),
        "y_px": round(float(xy[1]), 3),
    }
    if np.isfinite(array).all():
        out |= {"array_x": round(float(array[0]), 4), "array_y": round(float(array[1]), 4)}
    if section.n_pooled is not None:
        out["n_pooled"] = int(section.n_pooled[i])
    return out | ({"label": section.labels[i]} if section.labels[i] else {})


def _overview(slide: Slide, mpp: float) -> tuple[bytes, float]:
    """Return a JPEG of the whole section, at most 1,024 px, and its um per px."""
    small, factor = slide.overview(OVERVIEW_PX)
    out = io.BytesIO()
    Image.fromarray(small).save(out, "JPEG", quality=85)
    return out.getvalue(), round(mpp * factor, 6)
