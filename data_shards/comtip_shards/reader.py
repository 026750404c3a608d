"""A shard set on disk, read at random: tiles, counts, spots, sections."""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
from PIL import Image
from scipy import sparse

from comtip_shards import record, spots
from comtip_shards.errors import ShardError
from comtip_shards.index import parse_index
from comtip_shards.manifest import GeneRow, ManifestSection, ShardEntry, read_manifest, sha256_of, unpack_bits
from comtip_shards.section import task_of
from comtip_shards.tiles import StainStats

_GAP, _SPAN = 1 << 16, 1 << 23
"""Members this close are read at once, up to so many bytes."""


class ShardSet:
    """Reads a folder that ``comtip shards build`` wrote.

    Every member is checked against its CRC-32 in the table of spots as it is read, and tables against their SHA-256 in
    the manifest: what comes back is what was written, or an error. :func:`comtip_shards.verify.verify` reads everything.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._extensions = (record.CODECS[self.manifest.tile.codec], "expr", "json")
        self._index: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._starts = np.array([s.first_spot for s in self.manifest.shards], np.int64)
        self._section_starts = np.array([s.first_spot for s in self.manifest.sections], np.int64)

    def __len__(self) -> int:
        return self.manifest.n_spots

    @cached_property
    def genes(self) -> list[GeneRow]:
        """The gene table, in the order of the rows of counts."""
        path = self._file(self.manifest.genes_file, self.manifest.genes_sha256, "the gene table", "genes")
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        if len(rows) != self.manifest.n_genes:
            raise ShardError(f"{path}: {len(rows)} genes, the manifest says {self.manifest.n_genes}", kind="genes")
        names = ("key", "species", "symbol", "ensembl", "name")
        if any(set(r) != set(names) or None in r.values() for r in rows):
            raise ShardError(f"{path}: the columns are not {', '.join(names)}", kind="genes")
        return [GeneRow(*(r[n] for n in names)) for r in rows]

    @cached_property
    def spots(self) -> pd.DataFrame:
        """One row per spot, indexed by ``spot_index``.

        Columns: section (number), spot_id, section_id, source_row (place in the source), x_px and y_px (px of the source
        image), array_x, array_y (NaN where unknown), label, n_pooled (0 where a spot is not pooled).
        """
        frame = spots.read_spots(self._spots_path, len(self))
        frame.insert(0, "section", self.sections_of(np.arange(len(self))))
        ids = np.array([s.section_id for s in self.manifest.sections], dtype=object)
        if not np.array_equal(frame["section_id"].to_numpy(dtype=object), ids[frame["section"].to_numpy()]):
            raise ShardError(f"{self._spots_path}: sections are not those of the manifest", kind="spots")
        return frame

    def sections_of(self, spot_index: Iterable[int]) -> np.ndarray:
        """Return the number of each spot's section, int32; reads nothing."""
        index = np.asarray(spot_index, np.int64)
        self._check_range(index)
        return (np.searchsorted(self._section_starts, index, side="right") - 1).astype(np.int32)

    def members(self, spot_index: Iterable[int], part: str) -> list[bytes]:
        """Return one member of each record as it was written: ``tile``, ``expr`` or ``json``.

        Records that lie side by side are read at once.

        Raises
        ------
        ShardError
            A shard is gone or cut short, or the bytes are not those that were written.
        """
        index = np.asarray(spot_index, np.int64)
        self._check_range(index)
        column = record.PARTS.index(part)
        out: list[bytes] = [b""] * index.size
        order = np.argsort(index, kind="stable")
        shard = np.searchsorted(self._starts, index[order], side="right") - 1
        for number in np.unique(shard):
            own = order[shard == number]
            self._read_shard(int(number), index[own], own, column, out)
        return out

    def tiles(self, spot_index: Iterable[int]) -> np.ndarray:
        """Return tiles, uint8 (n, S, S, 3)."""
        spec = self.manifest.tile
        index = np.asarray(spot_index, np.int64)
        out = np.empty((index.size, spec.px, spec.px, 3), np.uint8)
        for i, data in enumerate(self.members(index, "tile")):
            out[i] = record.decode_tile(data, spec.px, spec.codec, self.where(int(index[i])))
        return out

    def counts(self, spot_index: Iterable[int]) -> sparse.csr_matrix:
        """Return raw counts, int32 CSR (n, n_genes)."""
        index = np.asarray(spot_index, np.int64)
        n_genes = self.manifest.n_genes
        indptr, rows, data = record.decode_exprs(
            self.members(index, "expr"), n_genes, lambda i: self.where(int(index[i]))
        )
        return sparse.csr_matrix((data, rows, indptr), shape=(index.size, n_genes), dtype=np.int32)

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

    def source_order(self, section: int) -> np.ndarray:
        """Return a section's spots in the order of their source, int64: shards hold them shuffled."""
        own = self.select(sections=[section])
        return own[np.argsort(self.spots["source_row"].to_numpy()[own], kind="stable")]

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
        path = self._file(entry.file, entry.sha256, "the overview", "overview")
        try:
            with Image.open(io.BytesIO(path.read_bytes()), formats=["JPEG"]) as image:
                if image.size != (entry.width, entry.height) or entry.width * entry.height > 1 << 24:
                    raise ShardError(
                        f"{path}: {image.width} x {image.height} px, not what the manifest says", kind="overview"
                    )
                return np.asarray(image.convert("RGB")), entry.um_per_px
        except OSError as error:
            raise ShardError(f"{path}: the overview cannot be decoded ({error})", kind="overview") from error

    def where(self, spot: int) -> str:
        """Return the name of a record for an error: shard and key."""
        return f"{self.path / self._shard_of(spot).file}: record {record.key_of(spot)}"

    # -- members ----------------------------------------------------------------------------------------

    def _check_range(self, index: np.ndarray) -> None:
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(
                f"spots {index.min()} to {index.max()} are not all in {self.path}, which holds {len(self)}"
            )

    def _shard_of(self, spot: int) -> ShardEntry:
        return self.manifest.shards[int(np.searchsorted(self._starts, spot, side="right")) - 1]

    def _file(self, name: str, sha256: str, what: str, kind: str) -> Path:
        """Return the path of a file whose hash is the manifest's."""
        path = self.path / name
        if not path.is_file() or sha256_of(path) != sha256:
            raise ShardError(
                f"{path}: missing, or not {what} that the manifest was written with; copy it again", kind=kind
            )
        return path

    @cached_property
    def _spots_path(self) -> Path:
        return self._file(self.manifest.spots_file, self.manifest.spots_sha256, "the table of spots", "spots")

    @cached_property
    def _crcs(self) -> np.ndarray:
        return spots.read_crcs(self._spots_path, len(self))

    def places(self, shard: ShardEntry) -> tuple[np.ndarray, np.ndarray]:
        """Return where a shard's members lie, from its index: offsets and sizes, int64 (records, 3)."""
        if shard.index not in self._index:
            path = self._file(shard.index, shard.index_sha256, "the index", "index")
            self._index[shard.index] = parse_index(path.read_bytes(), shard, self.manifest.tile.codec, str(path))
        return self._index[shard.index]

    def _read_shard(self, number: int, index: np.ndarray, into: np.ndarray, column: int, out: list[bytes]) -> None:
        """Read one member of ascending spots of one shard into ``out[into]``."""
        shard = self.manifest.shards[number]
        offsets, sizes = self.places(shard)
        local = index - shard.first_spot
        start, size = offsets[local, column], sizes[local, column]
        new_run = np.flatnonzero(np.diff(start) > _GAP + size[:-1]) + 1
        try:
            with (self.path / shard.file).open("rb") as file:
                for run in np.split(np.arange(index.size), new_run):
                    for piece in np.array_split(
                        run, -(-int(start[run[-1]] + size[run[-1]] - start[run[0]]) // _SPAN) or 1
                    ):
                        self._read_run(file, index[piece], start[piece], size[piece], column, into[piece], out)
        except FileNotFoundError as error:
            raise ShardError(
                f"{self.path / shard.file}: the shard is gone; copy it back or build the set again", kind="vanished"
            ) from error
        except OSError as error:
            raise ShardError(f"{self.path / shard.file}: cannot be read ({error})", kind="unreadable") from error

    def _read_run(
        self, file: BinaryIO, index: np.ndarray, start: np.ndarray, size: np.ndarray, column: int, into: np.ndarray,
        out: list[bytes],
    ) -> None:  # fmt: skip
        if not index.size:
            return
        base = int(start[0])
        file.seek(base)
        data = file.read(int(start[-1] + size[-1]) - base)
        for spot, low, n, place in zip(
            index.tolist(), (start - base).tolist(), size.tolist(), into.tolist(), strict=True
        ):
            member = data[low : low + n]
            if len(member) != n or zlib.crc32(member) != self._crcs[spot, column]:
                name = f"{self.where(spot)}: the member .{self._extensions[column]}"
                if len(member) != n:
                    raise ShardError(f"{name} is cut short: the shard ends before it; copy it again", kind="truncated")
                raise ShardError(f"{name} is not what was written (CRC-32); copy the shard again", kind="checksum")
            out[place] = member
