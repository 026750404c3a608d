"""One section, cut and encoded, waiting until the gene table of the whole set is known."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comtip_shards.identifiers import map_genes
from comtip_shards.image import Slide
from comtip_shards.manifest import TileSpec
from comtip_shards.record import encode_tile
from comtip_shards.section import Section, SectionMeta
from comtip_shards.sources.base import SectionSource
from comtip_shards.tiles import StainStats, stain_stats

OVERVIEW_PX = 1024


def _none() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass
class Staged:
    """What :func:`stage_section` wrote. Gene indices are positions in ``keys``."""

    n_spots: int
    keys: list[str]
    spots: list[dict[str, Any]]
    source: dict[str, Any]
    stain: StainStats
    overview_mpp: float
    overview: bytes = b""
    indptr: np.ndarray = field(default_factory=_none)
    indices: np.ndarray = field(default_factory=_none)
    data: np.ndarray = field(default_factory=_none)
    tiles: np.ndarray = field(default_factory=_none)
    offsets: np.ndarray = field(default_factory=_none)

    def tile(self, i: int) -> bytes:
        """Return one encoded tile."""
        return self.tiles[self.offsets[i] : self.offsets[i + 1]].tobytes()


def stage_section(source: SectionSource, meta: SectionMeta, tile: TileSpec, mark: str, staging: Path) -> Path:
    """Read, cut and encode one section, unless this was done before from the same inputs; returns its file."""
    path = staging / f"{meta.section_id}-{mark[:16]}.npz"
    if path.is_file():
        return path  # written aside and renamed, so a file that is here is whole
    section = source.read()
    with section.open_slide() as slide:
        tiles = slide.tiles(section.xy, meta.mpp, tile.um, tile.px, tile.min_mpp)
        overview, overview_mpp = _overview(slide, meta.mpp)
        notes = [*section.notes, *slide.notes]
    encoded = [encode_tile(t, tile.codec, tile.quality) for t in tiles]
    genes = map_genes(section.gene_ids, meta.species, symbols=section.gene_symbols)
    counts = genes.sum_columns(section.counts)
    if meta.mpp > tile.min_mpp * 1.05:
        notes.append(
            f"the image has {meta.mpp:.2f} um per px, coarser than the set's {tile.min_mpp:g}: its blur may show"
        )
    if meta.donor.startswith("unstated:"):
        notes.append("the donor is not stated: taken as a donor of its own")
    kept, lost = int(counts.sum(dtype=np.int64)), int(section.counts.sum(dtype=np.int64))
    header = {
        "n_spots": len(section.spot_ids), "keys": genes.keys, "overview_mpp": overview_mpp,
        "stain": {"od_mean": stain_stats(tiles).od_mean, "od_std": stain_stats(tiles).od_std},
        "spots": [_spot(section, meta, i) for i in range(len(section.spot_ids))],
        "source": {
            "dropped_spots": section.dropped, "genes": genes.report(), "notes": notes,
            "unmapped_genes": len(genes.unmapped), "summed_genes": len(genes.collisions), "counts_left_out": lost - kept,
        },
    }  # fmt: skip
    aside = path.with_suffix(".writing")
    with aside.open("wb") as file:
        np.savez(
            file, header=_bytes(json.dumps(header).encode()), overview=_bytes(overview), indptr=counts.indptr.astype(np.int64),
            indices=counts.indices.astype(np.int64), data=counts.data.astype(np.int64), tiles=_bytes(b"".join(encoded)),
            offsets=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        )  # fmt: skip
    aside.rename(path)
    return path


def load_staged(path: Path, *, meta_only: bool = False) -> Staged:
    """Read a staged section; with ``meta_only`` without its tiles and counts."""
    with np.load(path, allow_pickle=False) as arrays:
        header = json.loads(arrays["header"].tobytes())
        stain = StainStats(tuple(header["stain"]["od_mean"]), tuple(header["stain"]["od_std"]))
        first = (header["n_spots"], header["keys"], header["spots"], header["source"], stain, header["overview_mpp"])
        if meta_only:
            return Staged(*first)
        names = ("indptr", "indices", "data", "tiles", "offsets")
        return Staged(*first, arrays["overview"].tobytes(), *(arrays[n] for n in names))


def _spot(section: Section, meta: SectionMeta, i: int) -> dict[str, Any]:
    xy, array, label = section.xy[i], section.array_xy[i], section.labels[i]
    out: dict[str, Any] = {
        "section_id": meta.section_id, "spot_id": section.spot_ids[i],
        "x_px": round(float(xy[0]), 3), "y_px": round(float(xy[1]), 3),
    }  # fmt: skip
    if np.isfinite(array).all():
        out |= {"array_x": round(float(array[0]), 4), "array_y": round(float(array[1]), 4)}
    if section.n_pooled is not None:
        out["n_pooled"] = int(section.n_pooled[i])
    return out | ({"label": label} if label else {})


def _overview(slide: Slide, mpp: float) -> tuple[bytes, float]:
    """Return a JPEG of the whole section, at most 1,024 px, and its um per px."""
    small, factor = slide.overview(OVERVIEW_PX)
    out = io.BytesIO()
    Image.fromarray(small).save(out, "JPEG", quality=85)
    return out.getvalue(), round(mpp * factor, 6)


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)
