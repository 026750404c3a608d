"""Measurements of ``comtip bench loader``: spots per second of each loader on a shard set, and of each decoder alone.

``bench/loader/compare.py`` adds the loaders of other projects to the same rounds.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from comtip_shards import ShardSet
from comtip_shards.builder.build import build_shards
from comtip_shards.format.tile_decoder import TileDecoder
from comtip_shards.sources import open_source
from PIL import Image

from comtip_fast.benchmarks.rounds import Contender, describe_machine, resident_mb, run_rounds, trim_free_memory
from comtip_fast.config.schema import DataConfig, GenesConfig, PanelConfig, RunConfig, TrainConfig
from comtip_fast.data.expression.training_tables import TrainingTables, training_tables
from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.data.loaders.factory import dali_is_installed, make_loader
from comtip_fast.data.records import EncodedSpots, SpotReader

log = logging.getLogger("comtip_fast")

DALI, TORCH, WDS = "comtip, dali", "comtip, torch", "comtip, wds"
DALI_TABLE = "comtip, dali, levels in memory"
DALI_LIMIT, PIL_LIMIT = "DALI decoding, nothing else", "PIL decoding, nothing else"
OWN_PIL_LIMIT = "comtip, PIL decoding, nothing else"
RATIOS = (
    ("DALI loader / DALI decoding, nothing else", DALI, DALI_LIMIT),
    ("DALI loader, levels in memory / DALI decoding, nothing else", DALI_TABLE, DALI_LIMIT),
)
WITHOUT_DECODER = ((TORCH, OWN_PIL_LIMIT), (WDS, OWN_PIL_LIMIT), (DALI, DALI_LIMIT), (DALI_TABLE, DALI_LIMIT))
"""Loaders, and the decoder whose CPU time is subtracted from theirs."""
GENES_PER_PANEL = 2
"""Smallest number of selected genes per gene of a panel, as in the configs for GPUs."""
MEMORY_SPOTS = 512
Kind = Literal["torch", "wds", "dali"]


@dataclass(frozen=True)
class Setting:
    """The shard set and the sizes of a measurement."""

    shards: ShardSet
    workers: int
    batch_size: int
    rounds: int
    spots: int
    """Spots per round and loader or decoder."""
    panel: int | None = None
    """Genes per batch, whose levels are decoded; None: at most 256."""

    @property
    def config(self) -> RunConfig:
        """Run config of the loaders; levels are decoded from the records, as in the loaders of other projects."""
        data = DataConfig(
            shards=str(self.shards.path), batch_size=self.batch_size, workers=self.workers, expression="records"
        )
        genes = GenesConfig()
        if self.panel is not None:
            genes = GenesConfig(per_cohort=max(genes.per_cohort, GENES_PER_PANEL * self.panel))
        return RunConfig(
            data=data,
            genes=genes,
            panel=PanelConfig(min_genes=self.panel or 256, max_genes=self.panel or 256),
            train=TrainConfig(threads=1),
        )


@dataclass(frozen=True)
class LoaderInputs:
    """Data that the measured loaders and decoders read."""

    streamed: TrainingTables
    """Tables of a run that decodes levels from the records."""
    in_memory: TrainingTables
    """Tables of a run that keeps all levels in memory."""
    encoded: EncodedSpots
    """All training spots, encoded."""
    bytes_per_spot: dict[str, float]
    """Bytes read per spot: ``tile``, ``record`` (tile and counts), ``tar`` (whole shards), ``raw`` (decoded pixels)."""


def open_set(shards: Path | None, source: Path, work: Path, px: int) -> ShardSet:
    """Open ``shards``; if it is None, build a set from ``source`` in ``work``, or open the earlier build.

    The tiles of the build are 224 um in ``px`` px.
    """
    if shards is None:
        shards = work / f"shards_{px}px"
        log.info("building %s at %d px into %s, if it is not there yet", source, px, shards)
        build_shards(open_source(source), shards, tile_px=px, tile_um=224.0, min_mpp=4.0, progress=True)
    return ShardSet(shards)


def load_inputs(setting: Setting) -> LoaderInputs:
    """Compute the training tables and read the encoded training spots.

    Raises
    ------
    ValueError, ShardError
        There are fewer training spots than a batch has, or fewer trained genes than a panel; or as for
        :func:`comtip_fast.data.expression.training_tables.training_tables`.
    """
    config = setting.config
    streamed = _streamed_tables(setting)
    in_memory = training_tables(setting.shards, replace(config, data=replace(config.data, expression="table")))
    encoded = SpotReader(setting.shards, with_counts=True).fetch(streamed.spots)
    return LoaderInputs(streamed, in_memory, encoded, _bytes_per_spot(setting.shards, encoded))


def _streamed_tables(setting: Setting) -> TrainingTables:
    """Return the tables of a run that decodes levels from the records; raises ValueError as :func:`load_inputs`."""
    tables = training_tables(setting.shards, setting.config)
    if tables.spots.size < setting.batch_size:
        raise ValueError(
            f"{setting.shards.name}: {tables.spots.size} training spots, fewer than a batch of {setting.batch_size}; give a smaller "
            "`batch_size`, or a larger set with `shards`"
        )
    if setting.panel is not None and len(tables.genes.trained) < setting.panel:
        raise ValueError(
            f"{setting.shards.name}: {len(tables.genes.trained)} trained genes, fewer than the {setting.panel} of a panel; give a "
            "smaller `panel`"
        )
    return tables


def contenders_of(setting: Setting, inputs: LoaderInputs) -> list[Contender]:
    """Return the loaders and decoders to measure, those with worker processes first."""
    size = inputs.bytes_per_spot

    def ours(name: str, kind: Kind, tables: TrainingTables, bytes_per_spot: float) -> Contender:
        return Contender(name, batch_sizes(make(kind, setting, tables)), bytes_per_spot)

    spec = setting.shards.manifest.tile
    own = partial(_decode_as_loaders, px=spec.px, codec=spec.codec)
    found = [
        Contender(PIL_LIMIT, _pil_alone(_decode_all, inputs.encoded.tiles, setting), size["tile"]),
        Contender(OWN_PIL_LIMIT, _pil_alone(own, inputs.encoded.tiles, setting), size["tile"]),
        ours(WDS, "wds", inputs.streamed, size["record"]),
        ours(TORCH, "torch", inputs.streamed, size["record"]),
    ]
    if dali_is_installed():
        found += [
            ours(DALI, "dali", inputs.streamed, size["record"]),
            ours(DALI_TABLE, "dali", inputs.in_memory, size["tile"]),
            Contender(DALI_LIMIT, _dali_alone(inputs.encoded.tiles, setting), size["tile"]),
        ]
    return found


def measure(setting: Setting, contenders: list[Contender]) -> None:
    """Start the loaders and decoders in their order, run all rounds, and close them.

    Those that fork worker processes must precede those that use DALI, whose threads do not survive a fork.
    """
    try:
        for contender in contenders:
            log.info("starting: %s", contender.name)
            next(contender.batches)
        run_rounds(contenders, rounds=setting.rounds, spots=setting.spots, warm=2 * setting.workers + 4)
    finally:
        for contender in contenders:
            contender.batches.close()


def memory(setting: Setting, epochs: int) -> dict[str, list[float]]:
    """Return, for ``torch`` and (if installed) ``dali``, the resident memory in MB after each of ``epochs`` epochs.

    An epoch has 512 to 1,023 evenly spaced training spots, or all spots if there are fewer.
    """
    tables = _streamed_tables(setting)
    tables.spots = tables.spots[:: max(1, tables.spots.size // MEMORY_SPOTS)]
    out: dict[str, list[float]] = {}
    kinds: tuple[tuple[str, Kind], ...] = ((TORCH, "torch"), (DALI, "dali"))
    for name, kind in kinds:
        if kind == "dali" and not dali_is_installed():
            continue
        loader = make(kind, setting, tables)
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


def make(kind: Kind, setting: Setting, tables: TrainingTables) -> BaseLoader:
    """Return the loader ``kind`` of this project, on the shard set of ``setting`` with the given tables."""
    config = setting.config
    return make_loader(replace(config, data=replace(config.data, loader=kind)), setting.shards, tables)


def batch_sizes(loader: BaseLoader) -> Generator[int, None, None]:
    """Iterate over a loader indefinitely and yield the number of spots of each batch."""
    for batch in loader.iterate():
        assert batch.tiles is not None
        yield len(batch.tiles)


def _chunks(tiles: list[bytes], size: int) -> Iterator[list[bytes]]:
    whole = [tiles[i : i + size] for i in range(0, len(tiles) - size + 1, size)]
    return cycle(whole or [tiles])


def _pil_alone(
    decode: Callable[[list[bytes]], int], tiles: list[bytes], setting: Setting
) -> Generator[int, None, None]:
    """Decode tiles from memory in processes that return no pixels."""
    with ProcessPoolExecutor(setting.workers) as pool:
        chunks = _chunks(tiles, setting.batch_size)
        ahead = [pool.submit(decode, next(chunks)) for _ in range(2 * setting.workers)]
        while True:
            ahead.append(pool.submit(decode, next(chunks)))
            yield ahead.pop(0).result()


def _decode_all(tiles: list[bytes]) -> int:
    """Decode tiles with PIL as other programs do, and return their number."""
    for data in tiles:
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return len(tiles)


def _decode_as_loaders(tiles: list[bytes], *, px: int, codec: str) -> int:
    """Decode tiles with PIL as the loaders of this project do, and return their number."""
    decoder = TileDecoder(px, codec)
    for data in tiles:
        decoder.decode(data, lambda: "a tile of the benchmark")
    return len(tiles)


def _dali_alone(tiles: list[bytes], setting: Setting) -> Generator[int, None, None]:
    """Decode tiles from memory with DALI on CPU threads: an upper bound for every loader that uses this decoder."""
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


def _bytes_per_spot(shards: ShardSet, encoded: EncodedSpots) -> dict[str, float]:
    """Return the bytes read per spot by kind of access."""
    tile = float(np.mean([len(t) for t in encoded.tiles]))
    expr = float(np.mean([len(e) for e in encoded.exprs]))
    tar = sum(s.bytes for s in shards.manifest.shards) / len(shards)
    return {"tile": tile, "record": tile + expr, "tar": tar, "raw": 3.0 * shards.manifest.tile.px**2}


# -- results -----------------------------------------------------------------------------------------------------

COLUMNS = ("contender", "spots_per_s", "lowest", "highest", "cpu_ms_per_spot", "bytes_per_spot")


def rows_of(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Return one row per loader or decoder, with the columns :data:`COLUMNS`."""
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


def ratios(contenders: Sequence[Contender], pairs: Sequence[tuple[str, str, str]] = RATIOS) -> dict[str, float]:
    """Return, by label, the median over rounds of the ratio of spots per second of two loaders or decoders.

    ``pairs`` are (label, numerator, denominator); a pair is left out if one of the two was not measured.
    """
    rate = {c.name: np.array(c.spots_per_s) for c in contenders}
    return {
        label: float(np.median(rate[above] / rate[below]))
        for label, above, below in pairs
        if above in rate and below in rate
    }


def costs_without_decoder(contenders: Sequence[Contender]) -> dict[str, float]:
    """Return, by loader, the median over rounds of its CPU ms per spot minus those of its decoder alone."""
    cpu = {c.name: np.array(c.cpu_ms) for c in contenders}
    return {
        name: float(np.median(cpu[name] - cpu[decoder]))
        for name, decoder in WITHOUT_DECODER
        if name in cpu and decoder in cpu
    }


def table_of(
    contenders: Sequence[Contender],
    resident: dict[str, list[float]],
    pairs: Sequence[tuple[str, str, str]] = RATIOS,
) -> list[str]:
    """Return the lines of the printed report."""
    lines = [f"{'':48s} {'spots/s':>9s} {'(range)':>17s} {'CPU ms/spot':>12s} {'bytes/spot':>11s}"]
    for r in sorted(rows_of(contenders), key=lambda row: -row["spots_per_s"]):
        spread = f"({r['lowest']:.0f} to {r['highest']:.0f})"
        lines.append(
            f"{r['contender']:48s} {r['spots_per_s']:9.0f} {spread:>17s} {r['cpu_ms_per_spot']:12.3f} {r['bytes_per_spot']:11d}"
        )
    lines += [f"{label}: {value:.2f}" for label, value in ratios(contenders, pairs).items()]
    for name, ms in costs_without_decoder(contenders).items():
        lines.append(f"{name}, CPU ms/spot without the decoder: {ms:.3f}")
    for name, mb in resident.items():
        lines.append(f"{name}: {mb[0]:.0f} MB resident after epoch 1, {mb[-1]:.0f} MB after epoch {len(mb)}")
    return lines


def write_results(
    folder: Path,
    setting: Setting,
    contenders: Sequence[Contender],
    resident: dict[str, list[float]],
    pairs: Sequence[tuple[str, str, str]] = RATIOS,
) -> None:
    """Write ``results.csv``, ``ratios.csv`` and, if memory was recorded, ``memory.csv``.

    Their first lines name the machine and the sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = [
        f"# {describe_machine(len(os.sched_getaffinity(0)))}",
        (
            f"# {setting.shards.manifest.tile.px} px tiles, batches of {setting.batch_size}, panels of {setting.panel or 'up to 256'} genes, "
            f"{setting.workers} workers, {setting.rounds} rounds of {setting.spots} spots"
        ),
    ]
    _write_csv(folder / "results.csv", head, COLUMNS, [list(r.values()) for r in rows_of(contenders)])
    _write_csv(
        folder / "ratios.csv",
        head,
        ("ratio", "value"),
        [[k, round(v, 4)] for k, v in ratios(contenders, pairs).items()],
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
