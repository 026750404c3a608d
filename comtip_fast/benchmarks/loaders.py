"""``comtip bench loader``: spots per second of our loaders, of peers, and of the decoders."""

from __future__ import annotations

import csv
import io
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from comtip_shards import ShardSet
from comtip_shards.build.build import build_shards
from comtip_shards.sources import open_source
from PIL import Image

from comtip_fast.benchmarks.loader_peers import h5_batches, webdataset_batches, write_h5
from comtip_fast.benchmarks.rounds import Contender, describe_machine, resident_mb, run_rounds, trim_free_memory
from comtip_fast.config.schema import DataConfig, PanelConfig, RunConfig, TrainConfig
from comtip_fast.data.expression.training_tables import TrainingTables, training_tables
from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.data.loaders.factory import dali_is_installed, make_loader
from comtip_fast.data.records import EncodedSpots, SpotReader

log = logging.getLogger("comtip_fast")

DALI, TORCH, WDS = "comtip, dali", "comtip, torch", "comtip, wds"
DALI_TABLE = "comtip, dali, levels in memory"
PEER, PEER_PILLOW = "webdataset + PIL, numpy views", "webdataset + PIL, Pillow views"
H5 = "HEST-style h5"
READER, DALI_LIMIT, PIL_LIMIT = (
    "DALI's own reader, decode only",
    "DALI decoding, nothing else",
    "PIL decoding, nothing else",
)
MB = 1e6
MEMORY_SPOTS = 512
Kind = Literal["torch", "wds", "dali"]


@dataclass(frozen=True)
class Setting:
    """Settings of a measurement."""

    shards: ShardSet
    work: Path
    """Folder for the h5 files."""
    workers: int
    batch_size: int
    rounds: int
    spots: int
    """Number of spots per round and contender."""
    rate_mb: float
    """Simulated storage rate in MB/s; 0 skips those contenders."""

    @property
    def config(self) -> RunConfig:
        """Config of the loaders; levels come from the records, as those of the peers do."""
        data = DataConfig(
            shards=str(self.shards.path), batch_size=self.batch_size, workers=self.workers, expression="records"
        )
        return RunConfig(data=data, panel=PanelConfig(min_genes=256, max_genes=256), train=TrainConfig(threads=1))


def open_set(shards: Path | None, source: Path, work: Path, px: int) -> ShardSet:
    """Open the shard set to measure on; without one, build ``source`` at ``px`` into ``work``, unless it exists."""
    if shards is None:
        shards = work / f"shards_{px}px"
        log.info("building %s at %d px into %s, unless it exists", source, px, shards)
        build_shards(open_source(source), shards, tile_px=px, tile_um=224.0, progress=True)
    return ShardSet(shards)


def measure(setting: Setting) -> list[Contender]:
    """Measure every contender; worker processes are forked before DALI starts threads."""
    config = setting.config
    streamed = training_tables(setting.shards, config)
    table = training_tables(setting.shards, replace(config, data=replace(config.data, expression="table")))
    panel = np.sort(np.random.default_rng(0).permutation(streamed.genes.trained.size)[:256])
    spots = streamed.spots
    encoded = SpotReader(setting.shards, with_counts=True).fetch(spots)
    contenders: list[Contender] = []

    def add(name: str, batches: Generator[int, None, None], bytes_per_spot: float) -> None:
        log.info("starting: %s", name)
        next(batches)
        contenders.append(Contender(name, batches, bytes_per_spot))

    sizes = _sizes(setting.shards, encoded)
    for name, how in ((PEER, "numpy"), (PEER_PILLOW, "pillow")):
        add(name, webdataset_batches(setting.shards, streamed, panel, config.data, how), sizes["tar"])
    write_h5(setting.shards, setting.work / "h5")
    rates = [0.0, setting.rate_mb] if setting.rate_mb else [0.0]
    for rate in rates:
        batches = h5_batches(setting.work / "h5", setting.shards, table, panel, config.data, "numpy", rate * MB)
        add(_at_rate(H5, rate), batches, sizes["raw"])
    add(PIL_LIMIT, _pil_decoding(encoded.tiles, setting), sizes["tile"])
    add(WDS, _ours("wds", setting, streamed), sizes["record"])
    add(TORCH, _ours("torch", setting, streamed), sizes["record"])
    if dali_is_installed():
        for rate in rates:
            add(_at_rate(DALI, rate), _ours("dali", setting, streamed, rate), sizes["record"])
        add(DALI_TABLE, _ours("dali", setting, table), sizes["tile"])
        add(READER, _dali_reader(setting), sizes["tar"])
        add(DALI_LIMIT, _dali_decoding(encoded.tiles, setting), sizes["tile"])
    try:
        run_rounds(contenders, rounds=setting.rounds, spots=setting.spots, warm=2 * setting.workers + 4)
    finally:
        for contender in contenders:
            contender.batches.close()
    return contenders


def memory(setting: Setting, epochs: int) -> dict[str, list[float]]:
    """Return the resident memory in MB after each of ``epochs`` epochs of about 512 spots, by loader."""
    tables = training_tables(setting.shards, setting.config)
    tables.spots = tables.spots[:: max(1, tables.spots.size // MEMORY_SPOTS)]
    out: dict[str, list[float]] = {}
    kinds: tuple[tuple[str, Kind], ...] = ((TORCH, "torch"), (DALI, "dali"))
    for name, kind in kinds:
        if kind == "dali" and not dali_is_installed():
            continue
        loader = _make(kind, setting, tables)
        stream, n = loader.iterate(), len(loader.batches(0))
        out[name] = []
        for _ in range(epochs):
            for _ in range(n):
                next(stream)
            trim_free_memory()
            out[name].append(resident_mb())
        stream.close()
    return out


# -- contenders --------------------------------------------------------------------------------------------------


def _make(kind: Kind, setting: Setting, tables: TrainingTables) -> BaseLoader:
    config = setting.config
    return make_loader(replace(config, data=replace(config.data, loader=kind)), setting.shards, tables)


def _ours(kind: Kind, setting: Setting, tables: TrainingTables, rate_mb: float = 0.0) -> Generator[int, None, None]:
    loader = _make(kind, setting, tables)
    if rate_mb:
        _slow_down(loader.records, rate_mb * MB)
    for batch in loader.iterate():
        assert batch.tiles is not None
        yield len(batch.tiles)


def _slow_down(records: SpotReader, bytes_per_s: float) -> None:
    """Limit the read rate of a reader, to simulate slow storage."""
    fetch: Callable[[np.ndarray], EncodedSpots] = records.fetch

    def slow(spots: np.ndarray) -> EncodedSpots:
        start = time.perf_counter()
        encoded = fetch(spots)
        size = sum(map(len, encoded.tiles)) + sum(map(len, encoded.exprs))
        time.sleep(max(0.0, size / bytes_per_s - (time.perf_counter() - start)))
        return encoded

    records.fetch = slow  # type: ignore[method-assign]


def _chunks(tiles: list[bytes], size: int) -> Iterator[list[bytes]]:
    full_chunks = [tiles[i : i + size] for i in range(0, len(tiles) - size + 1, size)]
    return cycle(full_chunks or [tiles])


def _pil_decoding(tiles: list[bytes], setting: Setting) -> Generator[int, None, None]:
    """Decode tiles from memory with Pillow in worker processes, which return only counts."""
    with ProcessPoolExecutor(setting.workers) as pool:
        chunks = _chunks(tiles, setting.batch_size)
        pending = [pool.submit(_decode_all, next(chunks)) for _ in range(2 * setting.workers)]
        while True:
            pending.append(pool.submit(_decode_all, next(chunks)))
            yield pending.pop(0).result()


def _decode_all(tiles: list[bytes]) -> int:
    for data in tiles:
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return len(tiles)


def _dali_decoding(tiles: list[bytes], setting: Setting) -> Generator[int, None, None]:
    """Decode tiles from memory with DALI: an upper limit for loaders built on this decoder."""
    from comtip_fast.data.loaders.dali import Decoder

    decoder = Decoder(setting.batch_size, setting.workers, None)
    chunks = _chunks(tiles, setting.batch_size)
    for _ in range(decoder.depth):
        decoder.start(next(chunks))
    while True:
        size = len(decoder.get())
        decoder.release()
        decoder.start(next(chunks))
        yield size


def _dali_reader(setting: Setting) -> Generator[int, None, None]:
    """Read with ``fn.readers.webdataset`` and the set's index files: DALI's order, without views, levels or resuming."""
    from importlib import import_module

    dali: Any = import_module("nvidia.dali")
    shards = setting.shards
    train = {s.section_id for s in shards.manifest.sections if s.split == "train"}
    files = [s for s in shards.manifest.shards if s.section_id in train]

    @dali.pipeline_def(batch_size=setting.batch_size, num_threads=setting.workers, device_id=None)
    def pipeline() -> Any:
        jpeg, expr = dali.fn.readers.webdataset(
            paths=[str(shards.path / s.file) for s in files],
            index_paths=[str(shards.path / s.index) for s in files],
            ext=["jpg", "expr"],
            random_shuffle=True,
            initial_fill=512,
            missing_component_behavior="error",
        )
        return dali.fn.decoders.image(jpeg, device="cpu", output_type=dali.types.RGB), expr

    pipe = pipeline()
    pipe.build()
    while True:
        tiles, _ = pipe.run()
        yield len(tiles)


def _at_rate(name: str, rate_mb: float) -> str:
    return f"{name}, storage of {rate_mb:g} MB/s" if rate_mb else name


def _sizes(shards: ShardSet, encoded: EncodedSpots) -> dict[str, float]:
    """Return the bytes per spot of each way of storing them."""
    tile = float(np.mean([len(t) for t in encoded.tiles]))
    expr = float(np.mean([len(e) for e in encoded.exprs]))
    tar = sum(s.bytes for s in shards.manifest.shards) / len(shards)
    return {"tile": tile, "record": tile + expr, "tar": tar, "raw": 3.0 * shards.manifest.tile.px**2}


# -- results -----------------------------------------------------------------------------------------------------

COLUMNS = ("contender", "spots_per_s", "lowest", "highest", "cpu_ms_per_spot", "bytes_per_spot")


def rows_of(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Return one row per contender."""
    return [
        {
            "contender": c.name,
            "spots_per_s": round(c.median, 1),
            "lowest": round(min(c.spots_per_s), 1),
            "highest": round(max(c.spots_per_s), 1),
            "cpu_ms_per_spot": round(float(np.median(c.cpu_ms)), 4),
            "bytes_per_spot": round(c.bytes_per_spot),
        }
        for c in contenders
    ]


def ratios(contenders: Sequence[Contender]) -> dict[str, float]:
    """Return the documented ratios of contenders, each the median over rounds of the ratio within a round."""
    rate = {c.name: np.array(c.spots_per_s) for c in contenders}
    out = {}
    for label, above, below in (
        ("DALI loader / webdataset + PIL, numpy views", DALI, PEER),
        ("DALI loader / webdataset + PIL, Pillow views", DALI, PEER_PILLOW),
        ("DALI loader / DALI decoding, nothing else", DALI, DALI_LIMIT),
        ("DALI loader, levels in memory / DALI decoding, nothing else", DALI_TABLE, DALI_LIMIT),
    ):
        if above in rate and below in rate:
            out[label] = float(np.median(rate[above] / rate[below]))
    return out


def table_of(contenders: Sequence[Contender], resident: dict[str, list[float]]) -> list[str]:
    """Return the lines of the report."""
    lines = [f"{'':48s} {'spots/s':>9s} {'(range)':>17s} {'CPU ms/spot':>12s} {'bytes/spot':>11s}"]
    for r in sorted(rows_of(contenders), key=lambda row: -row["spots_per_s"]):
        spread = f"({r['lowest']:.0f} to {r['highest']:.0f})"
        lines.append(
            f"{r['contender']:48s} {r['spots_per_s']:9.0f} {spread:>17s} {r['cpu_ms_per_spot']:12.3f} {r['bytes_per_spot']:11d}"
        )
    lines += [f"{label}: {value:.2f}" for label, value in ratios(contenders).items()]
    for name, mb in resident.items():
        lines.append(f"{name}: {mb[0]:.0f} MB resident after epoch 1, {mb[-1]:.0f} MB after epoch {len(mb)}")
    return lines


def write_results(
    folder: Path, setting: Setting, contenders: Sequence[Contender], resident: dict[str, list[float]]
) -> None:
    """Write ``results.csv``, ``ratios.csv`` and ``memory.csv``; the header has the machine and the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    head = [
        f"# {describe_machine(len(os.sched_getaffinity(0)))}",
        f"# {setting.shards.manifest.tile.px} px tiles, batches of {setting.batch_size}, {setting.workers} workers, "
        f"{setting.rounds} rounds of {setting.spots} spots",
    ]
    _write_csv(folder / "results.csv", head, COLUMNS, [list(r.values()) for r in rows_of(contenders)])
    _write_csv(
        folder / "ratios.csv", head, ("ratio", "value"), [[k, round(v, 4)] for k, v in ratios(contenders).items()]
    )
    if resident:
        table = [[name, i + 1, round(mb, 1)] for name, values in resident.items() for i, mb in enumerate(values)]
        _write_csv(folder / "memory.csv", head, ("loader", "epoch", "resident_mb"), table)


def _write_csv(path: Path, head: list[str], columns: Sequence[str], rows: list[list[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write("\n".join(head) + "\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
