"""A large shard set from a small one: every section is repeated under new names, without writing its tiles again.

    PYTHONPATH=.:kernels:data_shards python bench/scale/start.py build --out BASE --spots 100000 --sections 70 --genes 20000
    PYTHONPATH=.:kernels:data_shards python bench/scale/repeat.py BASE --times 15 50 --out SET15 SET50
    PYTHONPATH=.:kernels:data_shards python bench/scale/start.py measure SET50

The tars of the repeated sections are hard links to those of BASE. Everything that a start reads whole has its true size and is written
anew: manifest, spot table with checksums, indexes and statistics. What differs from a built set: tars repeat their bytes, so the page
cache holds more of them than it would of other tars, and the member names inside a repeated tar are those of BASE, which training does
not read (`comtip shards verify` refuses the set). Compare sizes with sets that were all written this way from one BASE.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from comtip_shards import ShardSet
from comtip_shards.format.manifest import NAME, ManifestSection, ShardEntry
from comtip_shards.format.record import key_of
from comtip_shards.format.spot_table import SCHEMA, SpotsWriter
from comtip_shards.format.statistics import FILE, SectionStatistics, write_statistics
from comtip_shards.reader.statistics import gene_statistics


def repeat(base: ShardSet, times: int, out: Path) -> None:
    """Write the set that has every section of ``base`` ``times`` times to the new folder ``out``, on the same file system."""
    for folder in ("shards", "overview"):
        (out / folder).mkdir(parents=True)
    sections: list[ManifestSection] = []
    shards: list[ShardEntry] = []
    for number in range(times):
        first = number * base.manifest.n_spots
        sections += [_section(base, s, number, first, out) for s in base.manifest.sections]
        shards += [_shard(base, s, number, first, out) for s in base.manifest.shards]
    (out / base.manifest.genes_file).write_bytes((base.path / base.manifest.genes_file).read_bytes())
    _write_spots(base, times, out)
    spots = out / base.manifest.spots_file
    manifest = replace(
        base.manifest,
        n_spots=times * base.manifest.n_spots,
        sections=sections,
        shards=shards,
        spots_sha256=hashlib.sha256(spots.read_bytes()).hexdigest(),
    )
    text = manifest.to_json()
    _write_statistics(base, json.loads(text)["digest"], times, out)
    (out / NAME).write_text(text, encoding="utf-8")


def _section(base: ShardSet, section: ManifestSection, number: int, first: int, out: Path) -> ManifestSection:
    overview = replace(section.overview, file=f"overview/{section.section_id}x{number}.jpg")
    os.link(base.path / section.overview.file, out / overview.file)
    return replace(
        section,
        section_id=f"{section.section_id}x{number}",
        donor=f"{section.donor}x{number}",
        first_spot=section.first_spot + first,
        overview=overview,
    )


def _shard(base: ShardSet, shard: ShardEntry, number: int, first: int, out: Path) -> ShardEntry:
    """Link a tar, and write its index with the keys of its new spots."""
    stem = Path(shard.file).stem.replace(shard.section_id, f"{shard.section_id}x{number}")
    tar, index = f"shards/{stem}.tar", f"shards/{stem}.idx"
    os.link(base.path / shard.file, out / tar)
    text = (base.path / shard.index).read_text(encoding="utf-8")
    text = re.sub(r"\b\d{9,}(?=\.)", lambda key: key_of(int(key[0]) + first), text)
    (out / index).write_text(text, encoding="utf-8")
    return replace(
        shard,
        file=tar,
        index=index,
        index_sha256=hashlib.sha256(text.encode()).hexdigest(),
        first_spot=shard.first_spot + first,
        section_id=f"{shard.section_id}x{number}",
    )


def _write_spots(base: ShardSet, times: int, out: Path) -> None:
    table = pq.read_table(base.path / base.manifest.spots_file, schema=SCHEMA)
    with SpotsWriter(out / base.manifest.spots_file) as writer:
        for number in range(times):
            shift = number * base.manifest.n_spots
            for section in base.manifest.sections:
                start, size = section.first_spot, section.n_spots
                part = {name: table.column(name).slice(start, size) for name in SCHEMA.names}
                part["spot_index"] = pa.array(np.arange(start, start + size) + shift)
                part["section_id"] = pa.array([f"{section.section_id}x{number}"] * size)
                writer.write_table(pa.table(part, schema=SCHEMA))


def _write_statistics(base: ShardSet, digest: str, times: int, out: Path) -> None:
    own = list(gene_statistics(base))

    def again() -> Iterator[SectionStatistics]:
        for _ in range(times):
            yield from own

    n_values = times * sum(s.detected.size for s in own)
    with (out / FILE).open("wb") as file:
        write_statistics(file, digest, times * [s.n_spots for s in own], n_values, again)


def main() -> None:
    """Write the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of a set that bench/scale/start.py has built")
    parser.add_argument("--times", type=int, nargs="+", required=True, help="how often each section occurs in each set")
    parser.add_argument("--out", type=Path, nargs="+", required=True, help="new folders, as many as --times")
    args = parser.parse_args()
    if len(args.times) != len(args.out):
        raise SystemExit(
            f"{len(args.times)} numbers after --times, but {len(args.out)} folders after --out; give as many"
        )
    base = ShardSet(args.base)
    for times, out in zip(args.times, args.out, strict=True):
        repeat(base, times, out)
        print(f"{out}: {times * base.manifest.n_spots:,} spots in {times * len(base.manifest.sections):,} sections")


if __name__ == "__main__":
    main()
