"""Random access to a shard set: tiles, counts, spots, sections."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import sparse

from comtip_shards.errors import ShardError
from comtip_shards.format import record
from comtip_shards.format import spot_table as spots
from comtip_shards.format.manifest import GeneRow, ManifestSection, ShardEntry, unpack_bits
from comtip_shards.format.tile_decoder import TileDecoder
from comtip_shards.names import FOREIGN, is_formula, shown
from comtip_shards.reader.record_reader import MemberReader
from comtip_shards.reader.shard_files import SetFiles
from comtip_shards.sections.section import cohort_of
from comtip_shards.slides.tiles import StainStats
from comtip_shards.storage.remote import Remote

MAX_GENE_TEXT = 1000
"""Maximum length of a text in the gene table, in characters."""


class ShardSet:
    """A shard set written by ``comtip shards build``.

    Every member is checked against its CRC-32 in the spot table when it is read, and tables against their SHA-256 in the
    manifest. :func:`comtip_shards.reader.verify.verify` checks the complete set.

    Parameters
    ----------
    path
        A folder, or the URL of one (``s3://``, ``gs://``, ``https://``, ``hf://`` ...), whose files are fetched into a
        cache on demand.
    remote
        Cache, timeouts and credentials, if ``path`` is a URL.

    Attributes
    ----------
    files
        Access to the files of the set.
    manifest
        The manifest.
    path
        The folder; for a remote set, a local folder with its manifest.
    name
        The folder or URL, for error messages.

    Raises
    ------
    ShardError
        The manifest is missing, unsupported or damaged.
    """

    def __init__(self, path: Path | str, *, remote: Remote | None = None) -> None:
        self.files = SetFiles(path, remote)
        self.manifest = self.files.manifest()
        self.path, self.name = self.files.folder, self.files.name
        self._reader = MemberReader(self.files, self.manifest)
        self._section_starts = np.array([s.first_spot for s in self.manifest.sections], np.int64)

    def __len__(self) -> int:
        return self.manifest.n_spots

    @cached_property
    def genes(self) -> list[GeneRow]:
        """The gene table, in the order of the columns of :meth:`counts`; raises ShardError if it is missing or damaged."""
        manifest = self.manifest
        data = self.files.verified(manifest.genes_file, manifest.genes_sha256, "the gene table", "genes")
        path = f"{self.name}/{manifest.genes_file}"
        try:
            text = io.StringIO(data.decode("utf-8"), newline="")
            rows = list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ShardError(f"{path}: not a table ({error}); {FOREIGN}", kind="genes") from error
        if len(rows) != self.manifest.n_genes:
            raise ShardError(
                f"{path}: {len(rows)} genes, but the manifest states {self.manifest.n_genes}; {FOREIGN}",
                kind="genes",
            )
        names = ("key", "species", "symbol", "ensembl", "name")
        if any(set(r) != set(names) or None in r.values() for r in rows):
            raise ShardError(f"{path}: the columns are not {', '.join(names)}; {FOREIGN}", kind="genes")
        genes = [GeneRow(*(r[n] for n in names)) for r in rows]
        _check_genes(genes, path)
        return genes

    @cached_property
    def spots(self) -> pd.DataFrame:
        """The spot table, one row per spot, indexed by ``spot_index``.

        Columns: section (number), section_id, spot_id, source_row (row in the source), x_px and y_px (px of the source
        image), array_x, array_y (NaN if unknown), label, n_pooled (0 if the spot is not pooled).

        Raises
        ------
        ShardError
            Of kind ``spots``: the table is missing or damaged, or its sections are not those of the manifest.
        """
        data, n, where = self._reader.spots_table()
        frame = spots.read_spots(data, n, where)
        frame.insert(0, "section", self.sections_of(np.arange(len(self))))
        ids = np.array([s.section_id for s in self.manifest.sections], dtype=object)
        if not np.array_equal(frame["section_id"].to_numpy(dtype=object), ids[frame["section"].to_numpy()]):
            raise ShardError(f"{where}: the sections do not match the manifest; {FOREIGN}", kind="spots")
        return frame

    def sections_of(self, spot_index: Iterable[int]) -> np.ndarray:
        """Return the section number of each spot, int32 (n,), without reading files; raises IndexError if one is out of range."""
        index = np.asarray(spot_index, np.int64)
        self._check_range(index)
        return (np.searchsorted(self._section_starts, index, side="right") - 1).astype(np.int32)

    def members(self, spot_index: Iterable[int], part: str) -> list[bytes]:
        """Return one encoded member of each record: ``tile``, ``expr`` or ``json``.

        Adjacent records are read in one request.

        Raises
        ------
        ShardError
            A shard is missing, truncated or unreadable, a checksum does not match, or a server fails.
        IndexError
            A spot index is out of range.
        """
        return self.members_of(spot_index, (part,))[0]

    def members_of(self, spot_index: Iterable[int], parts: Sequence[str]) -> list[list[bytes]]:
        """Return a list of members for each of ``parts``; see :meth:`members`. Each record is read once."""
        index = np.asarray(spot_index, np.int64)
        self._check_range(index)
        return self._reader.read(index, parts)

    def tiles(self, spot_index: Iterable[int]) -> np.ndarray:
        """Return decoded tiles, uint8 (n, S, S, 3); raises the errors of :meth:`members`, and ShardError for an invalid tile."""
        spec = self.manifest.tile
        index = np.asarray(spot_index, np.int64)
        out = np.empty((index.size, spec.px, spec.px, 3), np.uint8)
        decoder = TileDecoder(spec.px, spec.codec)
        for i, data in enumerate(self.members(index, "tile")):
            decoder.decode_into(out[i], data, partial(self.where, int(index[i])))
        return out

    def counts(self, spot_index: Iterable[int]) -> sparse.csr_matrix:
        """Return raw counts, int32 CSR (n, n_genes); raises the errors of :meth:`members`, and ShardError for invalid counts."""
        index = np.asarray(spot_index, np.int64)
        n_genes = self.manifest.n_genes
        indptr, rows, data = self.decode_counts(self.members(index, "expr"), index)
        return sparse.csr_matrix((data, rows, indptr), shape=(index.size, n_genes), dtype=np.int32)

    def decode_counts(
        self, exprs: Sequence[bytes], spot_index: Iterable[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decode the ``expr`` members of spots: indptr int64 (n + 1,), gene rows int32 (nnz,), counts int32 (nnz,).

        Raises
        ------
        ShardError
            A member holds invalid counts.
        """
        index = np.asarray(spot_index, np.int64)
        return record.decode_exprs([*exprs], self.manifest.n_genes, lambda i: self.where(int(index[i])))

    def measured(self, section: int) -> np.ndarray:
        """Return a boolean mask, (n_genes,), of the genes that the assay of a section covers, detected or not."""
        meta = self.manifest.sections[section]
        return unpack_bits(meta.assay_genes, self.manifest.n_genes, f"{self.name}: assay_genes of {meta.section_id}")

    def select(self, split: str | None = None, sections: Sequence[int] | None = None) -> np.ndarray:
        """Return the ascending spot indices, int64, of sections in ``split`` whose number is in ``sections``; None means all."""
        parts = [
            np.arange(s.first_spot, s.first_spot + s.n_spots, dtype=np.int64)
            for i, s in enumerate(self.manifest.sections)
            if (split is None or s.split == split) and (sections is None or i in set(sections))
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def source_order(self, section: int) -> np.ndarray:
        """Return a section's spot indices, int64, in the order of the source; shards store spots shuffled."""
        own = self.select(sections=[section])
        return own[np.argsort(self.spots["source_row"].to_numpy()[own], kind="stable")]

    def stain(self, section: int) -> StainStats:
        """Return the stain statistics of a section."""
        return self.manifest.sections[section].stain

    def section_number(self, section_id: str) -> int:
        """Return the number of a section (its index in the manifest); raises ShardError if the set does not have it."""
        ids = [s.section_id for s in self.manifest.sections]
        if section_id not in ids:
            raise ShardError(f"{self.name}: no section {section_id!r}; choose one of: {', '.join(ids)}")
        return ids.index(section_id)

    def cohort_of_section(self, section: int) -> str:
        """Return the cohort of a section: species and organ, such as ``human_breast``."""
        meta: ManifestSection = self.manifest.sections[section]
        return cohort_of(meta.species, meta.tissue)

    def overview(self, section: int) -> tuple[np.ndarray, float]:
        """Return a thumbnail of the section, uint8 (H, W, 3), and its um per px; raises ShardError if it is missing or damaged."""
        entry = self.manifest.sections[section].overview
        data = self.files.verified(entry.file, entry.sha256, "the overview", "overview")
        path = f"{self.name}/{entry.file}"
        try:
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                if image.size != (entry.width, entry.height) or entry.width * entry.height > 1 << 24:
                    raise ShardError(
                        f"{path}: {image.width} x {image.height} px, but the manifest states {entry.width} x {entry.height} px; "
                        f"{FOREIGN}",
                        kind="overview",
                    )
                return np.asarray(image.convert("RGB")), entry.um_per_px
        except (OSError, Image.DecompressionBombError) as error:
            raise ShardError(f"{path}: the overview cannot be decoded ({error}); {FOREIGN}", kind="overview") from error

    def where(self, spot: int) -> str:
        """Return the name of a record for error messages: shard and key."""
        return self._reader.where(spot)

    def member_ranges(self, shard: ShardEntry) -> tuple[np.ndarray, np.ndarray]:
        """Return the offsets and sizes of a shard's members, each int64 (records, 3); raises ShardError for a damaged index."""
        return self._reader.member_ranges(shard)

    def shards_of(self, spot_index: Iterable[int]) -> np.ndarray:
        """Return the numbers (indices in the manifest) of the shards that hold these spots, ascending.

        Raises
        ------
        IndexError
            A spot index is out of range.
        """
        index = np.asarray(spot_index, np.int64)
        self._check_range(index)
        return np.unique(self._reader.shard_numbers(index))

    def fetch(self, shard: int) -> None:
        """Fetch a shard of a remote set into the cache. Errors are not raised here, but when the shard is read."""
        self._reader.fetch(shard)

    @property
    def fetches_shards(self) -> bool:
        """Whether reading a record fetches its whole shard into the cache: the set is remote and not read by ranges."""
        return self.files.remote is not None and not self.files.ranges

    def read_by_ranges(self, ranges: bool) -> None:
        """From now on, request parts of remote shards by byte ranges if ``ranges`` is True; otherwise fetch whole shards."""
        self.files.ranges = ranges

    def by_ranges(self) -> AbstractContextManager[None]:
        """Return a context in which remote shards are read by byte ranges, which suits a few records of many shards."""
        return self.files.by_ranges()

    @property
    def paths(self) -> list[Path]:
        """The folder :attr:`path`, or those of all sets that were opened together."""
        return [self.path]

    @property
    def digests(self) -> list[str]:
        """The digest of the manifest of each set in :attr:`paths`."""
        return [self.manifest.digest]

    def set_of_section(self, section: int) -> int:
        """Return the number, from 0, of the set that holds a section, among the sets that were opened together."""
        return 0

    def _check_range(self, index: np.ndarray) -> None:
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(
                f"spots {index.min()} to {index.max()} are out of range: {self.name} has {len(self)} spots; use 0 to {len(self) - 1}"
            )


def _check_genes(genes: Sequence[GeneRow], path: str) -> None:
    """Check the rows of a gene table: keys must be valid and unique, and texts short and safe to open in a spreadsheet."""
    seen: set[str] = set()
    for line, gene in enumerate(genes, 2):
        problem = ""
        if gene.key in seen:
            problem = "is a duplicate"
        elif gene.key != f"{gene.species}:{gene.symbol}" or gene.species not in ("human", "mouse"):
            problem = f"is not species:symbol of {gene.species[:20]!r} and {gene.symbol[:40]!r}"
        elif not gene.symbol:
            problem = "has no symbol"
        elif not gene.key.isprintable():
            problem = "contains characters that cannot be printed"
        elif max(len(gene.key), len(gene.ensembl), len(gene.name)) > MAX_GENE_TEXT:
            problem = f"has a text of more than {MAX_GENE_TEXT:,} characters"
        elif any(map(is_formula, (gene.symbol, gene.ensembl, gene.name))):
            problem = "has a symbol, id or name that a spreadsheet would run as a formula"
        if problem:
            raise ShardError(f"{path}: line {line}: the key {shown(gene.key)} {problem}; {FOREIGN}", kind="genes")
        seen.add(gene.key)
