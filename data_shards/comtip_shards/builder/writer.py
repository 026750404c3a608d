"""Sections with all their records to tars, indexes, tables and the manifest.

What is written here comes from a staging folder (``build``) or from finished parts (``merge``): both give the same
bytes for the same sections, because nothing but the spot index and the gene rows depends on the other sections.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from comtip_shards.genes.identifiers import RESOURCE, GeneResource
from comtip_shards.names import inside
from comtip_shards.sampling.rng import permutation
from comtip_shards.sections.section import SectionMeta
from comtip_shards.slides.tiles import StainStats
from comtip_shards.storage.atomic import flush, flush_tree, write_atomic

FOLDERS = ("shards", "overview", "spots")


@dataclass
class SectionHead:
    """What is known of a section without its records."""

    meta: SectionMeta
    fingerprint: str
    n_spots: int
    keys: list[str]
    """Genes that it measured; ``RecordRun.columns`` are places in this list."""
    stain: StainStats
    overview: bytes
    overview_mpp: float
    source: dict[str, Any]
    pages: dict[str, str] = field(default_factory=dict)
    """What its checks found: ``{"json": text, "html": text}``."""


@dataclass
class RecordRun:
    """A run of records, in the order of the layout."""

    tiles: list[bytes]
    jsons: list[bytes]
    indptr: np.ndarray
    columns: np.ndarray
    counts: np.ndarray


class SectionRecords(Protocol):
    """A section ready to be written."""

    def head(self) -> SectionHead:
        """Return everything but the records."""

    def runs(self, size: int) -> Iterator[RecordRun]:
        """Yield the records, ``size`` at a time."""


def layout(section_id: str, n_spots: int) -> np.ndarray:
    """Return the order in which a section's spots are stored: int64 (n,), rows of the source.

    It is a keyed shuffle, so that any run of records is a random draw from the section.
    """
    return permutation(0, "layout", section_id, n=n_spots)


def made_with() -> dict[str, str]:
    """Return the versions that the bytes of a set depend on."""
    return {"pillow": _version("pillow"), "pyarrow": _version("pyarrow"), "genes": RESOURCE}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def set_fingerprint(prints: Sequence[str], records_per_shard: int) -> str:
    """Return the fingerprint of a set from those of its sections."""
    return hashlib.sha256(json.dumps([list(prints), records_per_shard]).encode()).hexdigest()


Runner = Callable[[Callable[..., "Written"], Sequence[tuple[object, ...]]], list["Written"]]


@dataclass
class Written:
    """What :func:`write_section` wrote; the spots' rows are in a table of their own until all are there."""

    section: ManifestSection
    shards: list[ShardEntry]


def write_set(
    sections: Sequence[SectionRecords],
    tile: TileSpec,
    out: Path,
    records_per_shard: int,
    run: Runner,
    part: BuildPart | None = None,
    notes: Mapping[str, str] | None = None,
    beside: Mapping[str, str] | None = None,
) -> Manifest:
    """Write a whole set, the manifest last; returns the manifest.

    Parameters
    ----------
    sections
        In the order of the manifest.
    tile, records_per_shard, part
        As the manifest states them.
    out
        Folder; shards that an unfinished build left there are replaced.
    run
        :func:`comtip_shards.builder.jobs.run_jobs`, with its settings.
    notes, beside
        ``{section_id: note}``: of the section itself, and what only shows beside the other sections of the set.
    """
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir()
    union: set[str] = set()
    first, prints = [0], []
    for one in sections:  # one head at a time: a thousand of them hold many names
        head = one.head()
        union.update(head.keys)
        first.append(first[-1] + head.n_spots)
        prints.append(head.fingerprint)
    keys = sorted(union)
    _write_genes(out / GENES_FILE, keys)
    more = (notes or {}, beside or {})
    work = [(s, keys, tile, out, first[i], records_per_shard, *more) for i, s in enumerate(sections)]
    done = run(write_section, work)
    _join_spots([inside(out, f"spots/{d.section.section_id}.parquet") for d in done], out / spots.FILE)
    shutil.rmtree(out / "spots")
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
        fingerprint=set_fingerprint(prints, records_per_shard),
        made_with=made_with(),
        part=part,
    )
    write_atomic(out / REPORT_FILE, report(manifest))
    for name in FOLDERS:
        if (out / name).exists():
            flush_tree(out / name)
    for name in (GENES_FILE, spots.FILE):
        flush(out / name)
    # Last, as a set with a manifest counts as whole: after a power cut, too.
    write_atomic(out / NAME, manifest.to_json())
    return parse_manifest((out / NAME).read_bytes(), str(out / NAME))


def write_section(
    records: SectionRecords,
    keys: list[str],
    tile: TileSpec,
    out: Path,
    first: int,
    records_per_shard: int,
    notes: Mapping[str, str],
    beside: Mapping[str, str],
) -> Written:
    """Write one section's shards, indexes, overview and rows of the table of spots."""
    head = records.head()
    meta = head.meta
    own, others = ([n[meta.section_id]] if meta.section_id in n else [] for n in (notes, beside))
    head.source = head.source | {"notes": [*head.source["notes"], *own], "beside": others}
    place = {k: i for i, k in enumerate(keys)}
    rows = np.array([place[k] for k in head.keys], np.int64)
    entries = []
    with spots.SpotsWriter(inside(out, f"spots/{meta.section_id}.parquet")) as table:
        crcs, metas, start = [], [], first
        for number, run in enumerate(records.runs(records_per_shard)):
            file = shard_stem(meta.section_id, number)
            entry, crc = _write_shard(run, rows, tile.codec, out, file, start, meta.section_id)
            entries.append(entry)
            crcs.append(crc)
            metas += [record.decode_json(j, file) for j in run.jsons]
            start += entry.records
        table.write_table(spots.table_of(first, metas, np.concatenate(crcs)))
    return Written(_section_entry(head, rows, len(keys), out, first), entries)


def _write_shard(
    run: RecordRun, rows: np.ndarray, codec: str, out: Path, stem: str, first: int, section_id: str
) -> tuple[ShardEntry, np.ndarray]:
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
                # The name is short, so the header is one block; the data, padded, ends where the tar stands now.
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


def _join_spots(parts: Sequence[Path], path: Path) -> None:
    """Put the sections' tables into one, a row group each, without holding more than one."""
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
    """Return what the build counted, for people."""
    lines = [
        f"{len(manifest.sections)} sections, {manifest.n_spots} spots, {manifest.n_genes} genes, "
        f"{len(manifest.shards)} shards; tiles of {manifest.tile.um:g} um in {manifest.tile.px} px",
    ]
    trained = {s.donor for s in manifest.sections if s.split == "train"}
    for s in manifest.sections:
        lines.append(
            f"\n{s.section_id}: {s.species} {s.tissue}, donor {s.donor}, split {s.split or 'none'}, {s.n_spots} spots"
        )
        if s.split == "val" and s.donor in trained:
            lines.append("  the donor is a training donor too: this section may stop training, but proves nothing")
        lines += [f"  {n} spots left out: {reason}" for reason, n in s.source["dropped_spots"].items()]
        lines += [f"  {line}" for line in s.source["genes"].splitlines()]
        lines += [f"  {note}" for note in (*s.source["notes"], *s.source["beside"])]
    return "\n".join(lines) + "\n"
