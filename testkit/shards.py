"""Modify a shard set, with or without updating its hashes, CRCs and indexes to match."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from comtip_shards import ShardSet
from comtip_shards.format import spot_table as spots
from comtip_shards.format.index import index_text
from comtip_shards.format.manifest import Manifest, digest_of, sha256_of
from comtip_shards.format.record import members_of


def read_tar(path: Path) -> dict[str, bytes]:
    """Return {member name: bytes} of a shard."""
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        return {m.name: data[m.offset_data : m.offset_data + m.size] for m in tar}


def rewrite(path: Path, change: Callable[[dict[str, bytes]], object]) -> None:
    """Rewrite a tar with the members that ``change`` leaves in its argument, without updating anything else in the set."""
    members = read_tar(path)
    change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = False) -> None:
    """Edit ``manifest.json``; with ``seal`` also update its digest."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    if seal:
        data["digest"] = digest_of(data)
    path.write_text(json.dumps(data))


def reseal(folder: Path, manifest: Manifest) -> None:
    """Recompute indexes, CRCs, hashes and the digest from the current tars and tables, so that the set is consistent."""
    table = pq.read_table(folder / manifest.spots_file).to_pydict()
    entries = []
    for shard in manifest.shards:
        path = folder / shard.file
        with tarfile.open(path) as tar:
            spans = {m.name: (m.offset_data, m.size) for m in tar}
        data = path.read_bytes()
        names = [members_of(s, manifest.tile.codec) for s in range(shard.first_spot, shard.first_spot + shard.records)]
        span = np.array([[spans[n] for n in three] for three in names])
        for spot, three in enumerate(span.tolist(), shard.first_spot):
            for column, (start, size) in zip(spots.CRC_COLUMNS, three, strict=True):
                table[column][spot] = zlib.crc32(data[start : start + size])
        text = index_text(shard.first_spot, manifest.tile.codec, span[..., 0], span[..., 1])
        (folder / shard.index).write_text(text)
        sealed = dataclasses.replace(
            shard, sha256=sha256_of(path), bytes=len(data), index_sha256=sha256_of(folder / shard.index)
        )
        entries.append(dataclasses.asdict(sealed))
    pq.write_table(pa.table(table, schema=spots.SCHEMA), folder / manifest.spots_file)
    seal_files(folder, {"shards": entries})


def seal_files(folder: Path, more: dict[str, Any] | None = None) -> None:
    """Update the hashes of the tables in the manifest, further fields in ``more``, and the digest."""

    def change(data: dict[str, Any]) -> None:
        data.update(more or {})
        for what in ("genes", "spots"):
            data[f"{what}_sha256"] = sha256_of(folder / data[f"{what}_file"])

    change_manifest(folder, change, seal=True)


def without_genes(shards: ShardSet, names: set[str]) -> ShardSet:
    """Return the shard set with sections that did not measure the genes with these keys or symbols."""
    out = ShardSet(shards.path)
    missing = np.array([not names.isdisjoint((gene.key, gene.symbol)) for gene in out.genes])
    out.measured = lambda number: shards.measured(number) & ~missing  # type: ignore[method-assign]
    return out
