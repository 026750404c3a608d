"""A shard set on disk, read at random: tiles, counts, spots, sections."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import sparse

from comtip_shards import record
from comtip_shards.errors import ShardError
from comtip_shards.manifest import GeneRow, ManifestSection, ShardEntry, read_manifest, sha256_of, unpack_bits
from comtip_shards.section import task_of
from comtip_shards.tarindex import index_tar
from comtip_shards.tiles import StainStats

SPOT_COLUMNS = ["section", "section_id", "spot_id", "x_px", "y_px", "array_x", "array_y", "label"]


class ShardSet:
    """Reads a folder that ``comtip shards build`` wrote.

    Shards are indexed when they are first touched; data is read by offset. Hashes are checked by
    :func:`comtip_shards.verify.verify`, which reads everything; here every record is checked as it is decoded.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._index: dict[str, dict[str, tuple[int, int]]] = {}
        self._starts = np.array([s.first_spot for s in self.manifest.shards], np.int64)

    def __len__(self) -> int:
        return self.manifest.n_spots

    @cached_property
    def genes(self) -> list[GeneRow]:
        """The gene table, in the order of the rows of counts."""
        path = self.path / self.manifest.genes_file
        if not path.is_file() or sha256_of(path) != self.manifest.genes_sha256:
            raise ShardError(f"{path}: missing, or not the gene table that the manifest was written with")
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        if len(rows) != self.manifest.n_genes:
            raise ShardError(f"{path}: {len(rows)} genes, the manifest says {self.manifest.n_genes}")
        return [GeneRow(r["key"], r["species"], r["symbol"], r["ensembl"], r["name"]) for r in rows]

    @cached_property
    def spots(self) -> pd.DataFrame:
        """One row per spot, indexed by ``spot_index``: section, ids, positions in px of the source image, label."""
        rows = []
        for spot in range(len(self)):
            meta = record.decode_json(self._member(spot, "json"), self._where(spot))
            section = self._section_of(spot)
            if meta["section_id"] != self.manifest.sections[section].section_id:
                raise ShardError(f"{self._where(spot)}: says section {meta['section_id']}, the manifest says otherwise")
            nan = float("nan")
            rows.append((section, meta["section_id"], meta["spot_id"], float(meta["x_px"]), float(meta["y_px"]),
                         float(meta.get("array_x", nan)), float(meta.get("array_y", nan)), meta.get("label", "")))  # fmt: skip
        return pd.DataFrame(rows, columns=SPOT_COLUMNS, index=pd.RangeIndex(len(self), name="spot_index"))

    def tiles(self, spot_index: Iterable[int]) -> np.ndarray:
        """Return tiles, uint8 (n, S, S, 3)."""
        spec = self.manifest.tile
        index = np.asarray(spot_index, np.int64)
        out = np.empty((index.size, spec.px, spec.px, 3), np.uint8)
        extension = record.CODECS[spec.codec]
        for i, spot in enumerate(index.tolist()):
            out[i] = record.decode_tile(self._member(spot, extension), spec.px, spec.codec, self._where(spot))
        return out

    def counts(self, spot_index: Iterable[int]) -> sparse.csr_matrix:
        """Return raw counts, int32 CSR (n, n_genes)."""
        index = np.asarray(spot_index, np.int64)
        pairs = [
            record.decode_expr(self._member(s, "expr"), self.manifest.n_genes, self._where(s)) for s in index.tolist()
        ]
        indptr = np.cumsum([0, *(len(rows) for rows, _ in pairs)])
        rows = np.concatenate([r for r, _ in pairs]) if pairs else np.zeros(0, np.int32)
        data = np.concatenate([c for _, c in pairs]) if pairs else np.zeros(0, np.int32)
        return sparse.csr_matrix((data, rows, indptr), shape=(index.size, self.manifest.n_genes), dtype=np.int32)

    def measured(self, section: int) -> np.ndarray:
        """Return which genes of the table a section measured: bool (n_genes,)."""
        return unpack_bits(self.manifest.sections[section].assay_genes, self.manifest.n_genes)

    def select(self, split: str | None = None, sections: Sequence[int] | None = None) -> np.ndarray:
        """Return the spots of a split and/or of some sections (by number), ascending int64."""
        parts = [
            np.arange(s.first_spot, s.first_spot + s.n_spots, dtype=np.int64)
            for i, s in enumerate(self.manifest.sections)
            if (split is None or s.split == split) and (sections is None or i in set(sections))
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def stain(self, section: int) -> StainStats:
        """Return a section's stain."""
        return self.manifest.sections[section].stain

    def section_number(self, section_id: str) -> int:
        """Return a section's place in the manifest."""
        ids = [s.section_id for s in self.manifest.sections]
        if section_id not in ids:
            raise ShardError(f"{self.path} has no section {section_id!r}; it has: {', '.join(ids)}")
        return ids.index(section_id)

    def task_of_section(self, section: int) -> str:
        """Return species and organ of a section as one word."""
        meta: ManifestSection = self.manifest.sections[section]
        return task_of(meta.species, meta.tissue)

    def overview(self, section: int) -> tuple[np.ndarray, float]:
        """Return a small picture of the section, uint8 (H, W, 3), and its um per px."""
        entry = self.manifest.sections[section].overview
        path = self.path / entry.file
        if not path.is_file() or sha256_of(path) != entry.sha256:
            raise ShardError(f"{path}: missing, or not what the manifest says")
        with Image.open(io.BytesIO(path.read_bytes()), formats=["JPEG"]) as image:
            return np.asarray(image.convert("RGB")), entry.um_per_px

    # -- members ----------------------------------------------------------------------------------------

    def _shard_of(self, spot: int) -> ShardEntry:
        if not 0 <= spot < len(self):
            raise IndexError(f"spot {spot} is not in {self.path}, which holds {len(self)}")
        return self.manifest.shards[int(np.searchsorted(self._starts, spot, side="right")) - 1]

    def _section_of(self, spot: int) -> int:
        starts = [s.first_spot for s in self.manifest.sections]
        return int(np.searchsorted(starts, spot, side="right")) - 1

    def _where(self, spot: int) -> str:
        return f"{self.path / self._shard_of(spot).file}: record {record.key_of(spot)}"

    def _member(self, spot: int, extension: str) -> bytes:
        shard = self._shard_of(spot)
        path = self.path / shard.file
        if shard.file not in self._index:
            self._index[shard.file] = index_tar(path)
        place = self._index[shard.file].get(f"{record.key_of(spot)}.{extension}")
        if place is None:
            raise ShardError(f"{self._where(spot)}: the member .{extension} is missing")
        with path.open("rb") as file:
            file.seek(place[0])
            data = file.read(place[1])
        if len(data) != place[1]:
            raise ShardError(f"{self._where(spot)}: the shard ends inside .{extension}; copy it again")
        return data
