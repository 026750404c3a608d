"""Writer of a shard set: tars with the records of its sections, indexes, tables and the manifest.

Sections come from a staging folder (``build``) or from finished sets (``merge``). A record depends on the other sections of the set
only in its spot index and gene rows, which this module assigns for both commands. Merging all parts of a build therefore gives the
same bytes as building all sections at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from comtip_shards.format import record
from comtip_shards.format import spot_table as spots
from comtip_shards.format.index import index_text
from comtip_shards.format.manifest import (
    GENES_FILE,
    NAME,
    REPORT_FILE,
    BuildPart,
    Manifest,
    ManifestSection,
    Overview,
    ShardEntry,
    TileSpec,
    overview_file,
    pack_bits,
    parse_manifest,
    sha256_of,
    shard_stem,
)
from comtip_shards.format.statistics import FILE as STATISTICS_FILE
from comtip_shards.format.statistics import (
    SectionStatistics,
    StatisticsSum,
    load_section,
    save_section,
    write_statistics,
)
from comtip_shards.genes.identifiers import RESOURCE, GeneResource
from comtip_shards.names import inside
from comtip_shards.qc.page import Pages
from comtip_shards.sampling.rng import permutation
from comtip_shards.sections.section import SectionMeta, SectionNotes
from comtip_shards.slides.tiles import StainStats
from comtip_shards.storage.atomic import atomic_path, flush, flush_tree, write_atomic

FOLDERS = ("shards", "overview", "spots")


@dataclass
class SectionHead:
    """Everything about a section except its records: the content of its manifest entry."""

    meta: SectionMeta
    fingerprint: str
    n_spots: int
    keys: list[str]
    """Keys of the measured genes; ``RecordRun.columns`` are indices into this list."""
    stain: StainStats
    overview: bytes
    """JPEG of the whole section."""
    overview_mpp: float
    """um per px of the overview."""
    source: dict[str, Any]
    """:attr:`comtip_shards.format.manifest.ManifestSection.source`."""
    pages: Pages = field(default_factory=dict)
    """Report pages of the section's checks: ``{"json": text, "html": text}``."""


@dataclass
class RecordRun:
    """n consecutive records, in the order of :func:`layout`; ``indptr``, ``columns`` and ``counts`` are a CSR matrix."""

    tiles: list[bytes]
    """Encoded tiles."""
    jsons: list[bytes]
    """``.json`` members."""
    indptr: np.ndarray
    """Integers (n + 1,)."""
    columns: np.ndarray
    """Integers (nnz,), indices into :attr:`SectionHead.keys`."""
    counts: np.ndarray
    """Integers (nnz,), raw counts."""


class SectionRecords(Protocol):
    """A section ready to be written."""

    def head(self) -> SectionHead:
        """Return everything except the records."""

    def runs(self, size: int) -> Iterator[RecordRun]:
        """Yield the records in the order of :func:`layout`, ``size`` at a time."""


def layout(section_id: str, n_spots: int) -> np.ndarray:
    """Return the order in which a section's spots are stored: int64 (n,), rows of the source.

    The order is a keyed shuffle, so that any run of records is a random sample of the section.
    """
    return permutation(0, "layout", section_id, n=n_spots)


def dependency_versions() -> dict[str, str]:
    """Return the versions on which the bytes of a set depend: ``made_with`` of the manifest."""
    return {"pillow": _version("pillow"), "pyarrow": _version("pyarrow"), "genes": RESOURCE}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def set_fingerprint(fingerprints: Sequence[str], records_per_shard: int) -> str:
    """Return the fingerprint of a set (SHA-256, hex) from those of its sections."""
    return hashlib.sha256(json.dumps([list(fingerprints), records_per_shard]).encode()).hexdigest()


Runner = Callable[[Callable[..., "WrittenSection"], Sequence[tuple[object, ...]]], list["WrittenSection"]]


@dataclass
class WrittenSection:
    """Result of :func:`write_section`; spot rows and gene statistics are in files in ``spots/`` until all sections are written."""

    section: ManifestSection
    shards: list[ShardEntry]


def write_set(
    sections: Sequence[SectionRecords],
    tile: TileSpec,
    out: Path,
    records_per_shard: int,
    run: Runner,
    part: BuildPart | None = None,
    notes: SectionNotes | None = None,
    duplicates: SectionNotes | None = None,
) -> Manifest:
    """Write a complete set, the manifest last, and return the manifest.

    Parameters
    ----------
    sections
        Sections in the order of the manifest.
    tile, records_per_shard, part
        Fields of the manifest.
    out
        Output folder; shards of an unfinished build are replaced.
    run
        :func:`comtip_shards.builder.jobs.run_jobs` with its settings bound.
    notes, duplicates
        ``{section_id: note}``: notes on the section itself, and on sections of this set that it duplicates.
    """
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir()
    keys, first, fingerprints = _survey(sections)
    _write_genes(out / GENES_FILE, keys)
    more = (notes or {}, duplicates or {})
    work = [(s, keys, tile, out, first[i], records_per_shard, *more) for i, s in enumerate(sections)]
    done = run(write_section, work)
    _concat_spots([inside(out, f"spots/{d.section.section_id}.parquet") for d in done], out / spots.FILE)
    manifest = Manifest(
        tile=tile,
        records_per_shard=records_per_shard,
        genes_file=GENES_FILE,
        genes_sha256=sha256_of(out / GENES_FILE),
        n_genes=len(keys),
        spots_file=spots.FILE,
        spots_sha256=sha256_of(out / spots.FILE),
        n_spots=first[-1],
        sections=[d.section for d in done],
        shards=[e for d in done for e in d.shards],
        fingerprint=set_fingerprint(fingerprints, records_per_shard),
        made_with=dependency_versions(),
        part=part,
    )
    return _finish(out, manifest)


def _survey(sections: Sequence[SectionRecords]) -> tuple[list[str], list[int], list[str]]:
    """Return (gene keys of a set, first spot of each section followed by the number of spots, fingerprints of the sections)."""
    union: set[str] = set()
    first, fingerprints = [0], []
    for one in sections:  # one head at a time, to bound memory
        head = one.head()
        union.update(head.keys)
        first.append(first[-1] + head.n_spots)
        fingerprints.append(head.fingerprint)
    return sorted(union), first, fingerprints


def _finish(out: Path, manifest: Manifest) -> Manifest:
    """Write report, statistics and manifest; the manifest last, because a set with one counts as complete after a power failure."""
    write_atomic(out / REPORT_FILE, report(manifest))
    text = manifest.to_json()
    _merge_statistics(out, manifest.sections, json.loads(text)["digest"])
    shutil.rmtree(out / "spots")
    _flush_files(out)
    write_atomic(out / NAME, text)
    return parse_manifest((out / NAME).read_bytes(), str(out / NAME))


def _merge_statistics(out: Path, sections: Sequence[ManifestSection], digest: str) -> None:
    """Write the statistics of the set from those of its sections, of which one is in memory at a time."""

    def read() -> Iterator[SectionStatistics]:
        for section in sections:
            yield load_section(inside(out, f"spots/{section.section_id}.statistics"), section.n_spots)

    n_values = sum(s.n_assay_genes for s in sections)
    with atomic_path(out / STATISTICS_FILE) as tmp_path, tmp_path.open("wb") as file:
        write_statistics(file, digest, [s.n_spots for s in sections], n_values, read)


def _flush_files(out: Path) -> None:
    """Flush all files of a set except the manifest to the device."""
    for name in FOLDERS:
        if (out / name).exists():
            flush_tree(out / name)
    for name in (GENES_FILE, spots.FILE):
        flush(out / name)


def write_section(
    records: SectionRecords,
    keys: list[str],
    tile: TileSpec,
    out: Path,
    first: int,
    records_per_shard: int,
    notes: SectionNotes,
    duplicates: SectionNotes,
) -> WrittenSection:
    """Write one section's shards, indexes and overview, and temporary files with its rows of the spot table and its statistics.

    Parameters
    ----------
    records
        The section.
    keys
        Gene keys of the set, in the order of the gene table.
    tile, out, records_per_shard, notes, duplicates
        As for :func:`write_set`.
    first
        Spot index of the section's first record.
    """
    head = records.head()
    meta = head.meta
    own, others = ([n[meta.section_id]] if meta.section_id in n else [] for n in (notes, duplicates))
    head.source = head.source | {"notes": [*head.source["notes"], *own], "beside": others}
    row_of = {k: i for i, k in enumerate(keys)}
    rows = np.array([row_of[k] for k in head.keys], np.int64)
    entries = []
    with spots.SpotsWriter(inside(out, f"spots/{meta.section_id}.parquet")) as table:
        crcs, metas, start, total = [], [], first, StatisticsSum(rows.size)
        for number, run in enumerate(records.runs(records_per_shard)):
            file = shard_stem(meta.section_id, number)
            entry, crc = _write_shard(run, rows, tile.codec, out, file, start, meta.section_id)
            entries.append(entry)
            crcs.append(crc)
            metas += [record.decode_json(j, file) for j in run.jsons]
            total.add(run.indptr, run.columns, run.counts)
            start += entry.records
        table.write_table(spots.table_of(first, metas, np.concatenate(crcs)))
    section = _section_entry(head, rows, len(keys), out, first)
    statistics = total.result(np.argsort(rows, kind="stable"))
    save_section(inside(out, f"spots/{meta.section_id}.statistics"), statistics)
    return WrittenSection(section, entries)


def _write_shard(
    run: RecordRun, rows: np.ndarray, codec: str, out: Path, stem: str, first: int, section_id: str
) -> tuple[ShardEntry, np.ndarray]:
    """Write one tar and its index; return the manifest entry and the CRC-32 of the members, uint32 (n, 3)."""
    n = len(run.tiles)
    offsets, sizes, crcs = (np.zeros((n, 3), t) for t in (np.int64, np.int64, np.uint32))
    path, index = inside(out, f"{stem}.tar"), inside(out, f"{stem}.idx")
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(n):
            span = slice(run.indptr[i], run.indptr[i + 1])
            own = rows[run.columns[span]]
            order = np.argsort(own, kind="stable")
            expr = record.encode_expr(own[order], run.counts[span][order])
            for j, (name, data) in enumerate(
                zip(record.members_of(first + i, codec), (run.tiles[i], expr, run.jsons[i]), strict=True)
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                # The name is short, so the header is one block; the padded data ends at the current position.
                offsets[i, j], sizes[i, j] = file.tell() - len(data) - (-len(data) % tarfile.BLOCKSIZE), len(data)
                crcs[i, j] = zlib.crc32(data)
    index.write_text(index_text(first, codec, offsets, sizes), encoding="ascii")
    entry = ShardEntry(
        file=f"{stem}.tar",
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        index=f"{stem}.idx",
        index_sha256=sha256_of(index),
        records=n,
        first_spot=first,
        section_id=section_id,
    )
    return entry, crcs


def _section_entry(head: SectionHead, rows: np.ndarray, n_genes: int, out: Path, first: int) -> ManifestSection:
    file = overview_file(head.meta.section_id)
    inside(out, file).write_bytes(head.overview)
    with Image.open(io.BytesIO(head.overview)) as picture:
        width, height = picture.size
    measured = np.zeros(n_genes, bool)
    measured[rows] = True
    return ManifestSection(
        **asdict(head.meta),
        n_spots=head.n_spots,
        first_spot=first,
        n_assay_genes=int(measured.sum()),
        assay_genes=pack_bits(measured),
        stain=head.stain,
        overview=Overview(file, sha256_of(out / file), head.overview_mpp, width, height),
        fingerprint=head.fingerprint,
        source=head.source,
    )


def _concat_spots(parts: Sequence[Path], path: Path) -> None:
    """Concatenate the sections' tables, one row group each, holding one table in memory at a time."""
    with spots.SpotsWriter(path) as table:
        for part in parts:
            rows: pa.Table = pq.read_table(part, schema=spots.SCHEMA, use_threads=False)
            table.write_table(rows, row_group_size=max(1, rows.num_rows))


def _write_genes(path: Path, keys: list[str]) -> None:
    resource = GeneResource.load()
    lines = ["key\tspecies\tsymbol\tensembl\tname\n"]
    for key in keys:
        species, symbol = key.split(":", 1)
        hit = resource.resolve(symbol, species)
        lines.append(f"{key}\t{species}\t{symbol}\t{hit.ensembl}\t{hit.name}\n")
    path.write_text("".join(lines), encoding="utf-8")


def report(manifest: Manifest) -> str:
    """Return the build statistics as text."""
    lines = [
        (
            f"{len(manifest.sections)} sections, {manifest.n_spots} spots, {manifest.n_genes} genes, "
            f"{len(manifest.shards)} shards; tiles of {manifest.tile.um:g} um in {manifest.tile.px} px"
        ),
    ]
    trained = {s.donor for s in manifest.sections if s.split == "train"}
    for s in manifest.sections:
        lines.append(
            f"\n{s.section_id}: {s.species} {s.tissue}, donor {s.donor}, split {s.split or 'none'}, {s.n_spots} spots"
        )
        if s.split == "val" and s.donor in trained:
            lines.append("  the donor is also a training donor: usable for early stopping, but not as evidence")
        lines += [f"  {n} spots left out: {reason}" for reason, n in s.source["dropped_spots"].items()]
        lines += [f"  {line}" for line in s.source["genes"].splitlines()]
        lines += [f"  {note}" for note in (*s.source["notes"], *s.source["beside"])]
    return "\n".join(lines) + "\n"
