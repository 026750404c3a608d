"""Slowdown of a busy training step that a loader feeds from background threads.

    PYTHONPATH=.:kernels:data_shards OMP_NUM_THREADS=1 python bench/loader/feeding.py SET [--panel 2048] [--shares 0.5 0.9]

The step is the near-empty one of ``bench/train/host_time.py``, whose time is what Python and PyTorch need to launch its operators: the
work of the host of a GPU. It runs in the main thread, alone and while a loader prepares batches in its threads. Each step takes one
batch, and does not use it. Batch sizes are chosen so that the loader needs a given share of one core (``--shares``); the table shows
the share that it needed. ``threads`` loads in threads of the measured process, as in training; ``process`` is a control, in which
another process loads the same batches at the same rate: what a step loses there is due to shared cores, caches and memory, and not to
Python's lock. ``torch,own`` and ``dali,own`` load in a process of their own (``data.loader_process: own``); in ``dali,apart``, that
process reads, and DALI's threads decode in this one, as for a GPU. ``wds`` has worker processes, too; these have no control.

Blocks alternate: alone, fed, alone, fed with the next loader, and so on. A fed block is compared with the mean of the blocks before
and after it. Nothing else may run on the machine; the load average before the start is printed. ``bench/scale/start.py build`` writes
a synthetic set.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from comtip_shards import ShardSet

from bench.train.host_time import near_empty_trainer, operators_of_step
from comtip_fast.benchmarks.loaders import Setting
from comtip_fast.benchmarks.rounds import cpu_seconds, describe_machine
from comtip_fast.data.expression.training_tables import TrainingTables, training_tables
from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.data.loaders.dali import DaliLoader
from comtip_fast.data.loaders.factory import make_loader
from comtip_fast.training.distributed.signals import Signals
from comtip_fast.training.trainer import Trainer

CALIBRATION_BATCH, CALIBRATION_BATCHES = 64, 12
PLACES = {
    "torch": "threads",
    "dali": "threads",
    "torch,own": "own process",
    "dali,own": "own process",
    "dali,apart": "own process, decoder here",
    "wds": "worker processes",
}
"""Where the batches of each value of ``--loaders`` are prepared."""
IDLE_S, IDLE_CPU_S, MOST_IDLE_CHECKS = 0.1, 0.01, 50
"""A loader is idle if it used at most ``IDLE_CPU_S`` of CPU time in ``IDLE_S`` seconds."""


class Feed(Protocol):
    """A source of batches that are prepared in the background."""

    def take(self) -> None:
        """Take one batch, and wait for it if it is not ready."""

    def close(self) -> None:
        """Stop the background work."""


class ThreadFeed:
    """A loader with its threads in this process."""

    def __init__(self, kind: str, setting: Setting, tables: TrainingTables) -> None:
        self._batches = loader_of(kind, setting, tables).iterate()

    def take(self) -> None:
        """Take one batch, and wait for it if it is not ready."""
        next(self._batches)

    def close(self) -> None:
        """Stop the threads."""
        self._batches.close()


def loader_of(kind: str, setting: Setting, tables: TrainingTables) -> BaseLoader:
    """Return the loader of a value of ``--loaders``."""
    name, _, where = kind.partition(",")
    data = replace(setting.config.data, loader=name, loader_process="own" if where else "training")
    loader = make_loader(replace(setting.config, data=data), setting.shards, tables)
    if isinstance(loader, DaliLoader):
        loader.decodes_apart = where == "apart"
    return loader


class ProcessFeed:
    """A loader in another process, which sends an empty reply for each batch that is taken."""

    def __init__(self, kind: str, setting: Setting, tables: TrainingTables) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, end = spawn.Pipe()
        path = setting.shards.path
        args = (end, kind, path, (setting.workers, setting.batch_size, setting.panel), tables)
        self._process = spawn.Process(target=_serve, args=args, daemon=True)
        self._process.start()
        end.close()
        self._pipe.send_bytes(b"1")

    def take(self) -> None:
        """Wait until the other process has taken the batch that was requested last, and request the next one."""
        self._pipe.recv_bytes()
        self._pipe.send_bytes(b"1")

    def close(self) -> None:
        """End the other process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, kind: str, path: Path, sizes: tuple[int, int, int | None], tables: TrainingTables) -> None:
    """Take one batch per request until the other end is closed."""
    torch.set_num_threads(1)
    workers, batch_size, panel = sizes
    feed = ThreadFeed(kind, Setting(ShardSet(path), workers, batch_size, 1, 1, panel), tables)
    try:
        while True:
            pipe.recv_bytes()
            feed.take()
            pipe.send_bytes(b"1")
    except (EOFError, OSError):
        feed.close()


@dataclass
class Block:
    """Steps that ran one after the other."""

    step_ms: float
    """Median elapsed time of a step, including the time it waited for its batch."""
    wait_ms: float
    """Mean time that a step waited for its batch."""
    running_ms: float
    """Median time of a step without the time in which its thread was ready to run but had no core: CPU time and waits."""
    background: float
    """CPU time of everything but the main thread, as a share of the elapsed time."""


@dataclass
class Row:
    """One loader at one rate, and its results."""

    kind: str
    where: str
    batch_size: int
    feed: Feed
    blocks: list[Block] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    """Time of a step while it is fed, divided by the time alone; one value per round."""
    running_ratios: list[float] = field(default_factory=list)
    """The same of the time without waits for a core."""

    def cells(self, alone: Sequence[Block]) -> list[str]:
        """Return the cells of the printed row."""
        ms = statistics.median(b.step_ms for b in self.blocks)
        waits = statistics.median(b.wait_ms for b in self.blocks)
        background = statistics.median(b.background for b in self.blocks)
        return [
            f"{self.kind.partition(',')[0]}, {self.where}",
            f"{self.batch_size}",
            f"{1e3 * self.batch_size / ms:,.0f}",
            f"{background:.0%}",
            _spread([b.step_ms for b in alone], "{:.1f}"),
            _spread([b.step_ms for b in self.blocks], "{:.1f}"),
            f"{waits:.2f}",
            _spread(self.ratios, "{:.3f}"),
            _spread(self.running_ratios, "{:.3f}"),
        ]


COLUMNS = (
    "loader",
    "batch",
    "spots/s",
    "CPU of the loader, share of a core",
    "step alone, ms",
    "step fed, ms",
    "of it waiting for a batch, ms",
    "ratio",
    "ratio without waits for a core",
)


def run_block(trainer: Trainer, steps: int, warm: int, feed: Feed | None = None) -> Block:
    """Run ``warm`` steps, then measure ``steps`` steps, each of which takes a batch of ``feed`` if it is given."""
    for _ in range(warm):
        _step(trainer, feed)
    start, cpu, main = time.perf_counter(), cpu_seconds(), time.thread_time()
    times = [_step(trainer, feed) for _ in range(steps)]
    background = cpu_seconds() - cpu - (time.thread_time() - main)
    elapsed, waited, without_core = ([1e3 * s for s in column] for column in zip(*times, strict=True))
    return Block(
        step_ms=statistics.median(elapsed),
        wait_ms=statistics.mean(waited),
        running_ms=statistics.median(e - w for e, w in zip(elapsed, without_core, strict=True)),
        background=background / (time.perf_counter() - start),
    )


def _step(trainer: Trainer, feed: Feed | None) -> tuple[float, float, float]:
    """Take a batch and run a step; return the seconds of both, those of the first, and those of the wait for a core."""
    queued, began = _queued_seconds(), time.perf_counter()
    if feed is not None:
        feed.take()
    ready = time.perf_counter()
    trainer._one_step(Signals())
    return time.perf_counter() - began, ready - began, _queued_seconds() - queued


def _queued_seconds() -> float:
    """Return the time so far in which this thread was ready to run but had no core; 0 if Linux does not count it."""
    try:
        return 1e-9 * int(Path("/proc/thread-self/schedstat").read_text(encoding="utf-8").split()[1])
    except OSError:
        return 0.0


def wait_until_idle() -> None:
    """Wait until the loaders have prepared as many batches as they may, so that nothing runs in the background."""
    for _ in range(MOST_IDLE_CHECKS):
        before = cpu_seconds()
        time.sleep(IDLE_S)
        if cpu_seconds() - before <= IDLE_CPU_S:
            return


def cpu_ms_per_spot(kind: str, setting: Setting, tables: TrainingTables) -> float:
    """Return the CPU milliseconds that a loader needs per spot, alone."""
    feed = ThreadFeed(kind, setting, tables)
    for _ in range(2 * setting.workers + 4):
        feed.take()
    before = cpu_seconds()
    for _ in range(CALIBRATION_BATCHES):
        feed.take()
    spent = cpu_seconds() - before
    feed.close()
    return 1e3 * spent / (CALIBRATION_BATCHES * setting.batch_size)


def rows_of(args: argparse.Namespace, tables: TrainingTables, shards: ShardSet, step_ms: float) -> Iterator[Row]:
    """Yield a row per loader, share of a core, and kind of feed; loaders start."""
    for kind in args.loaders:
        setting = Setting(shards, args.workers, CALIBRATION_BATCH, 1, 1, args.panel)
        cost = cpu_ms_per_spot(kind, setting, tables)
        print(f"{kind}: {cost:.3f} CPU ms per spot alone, in batches of {CALIBRATION_BATCH}", flush=True)
        for share in args.shares:
            size = max(2, round(share * step_ms / cost))
            if size > tables.spots.size:
                raise SystemExit(
                    f"{shards.name}: {tables.spots.size} training spots, fewer than a batch of {size}; build a larger set"
                )
            own = Setting(shards, args.workers, size, 1, 1, args.panel)
            yield Row(kind, PLACES[kind], size, ThreadFeed(kind, own, tables))
            if args.control and PLACES[kind] == "threads":  # a daemon may not have worker processes
                yield Row(kind, "process", size, ProcessFeed(kind, own, tables))


def measure(trainer: Trainer, rows: list[Row], rounds: int, steps: int, warm: int) -> list[Block]:
    """Fill ``rows`` with blocks of all rounds; return the blocks of the step alone."""
    wait_until_idle()
    alone = [run_block(trainer, steps, warm)]
    for _ in range(rounds):
        for row in rows:
            row.blocks.append(run_block(trainer, steps, warm, row.feed))
            wait_until_idle()
            alone.append(run_block(trainer, steps, 2))
            before, fed, after = alone[-2], row.blocks[-1], alone[-1]
            row.ratios.append(2 * fed.step_ms / (before.step_ms + after.step_ms))
            row.running_ratios.append(2 * fed.running_ms / (before.running_ms + after.running_ms))
    return alone


def _spread(values: Sequence[float], form: str) -> str:
    middle, low, high = (form.format(v) for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path, help="folder of the shard set")
    parser.add_argument("--panel", type=int, default=2048, help="genes per batch (default 2048)")
    parser.add_argument("--workers", type=int, default=2, help="data.workers (default 2)")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.5, 0.9], help="loader's shares of one core (default 0.5 0.9)"
    )
    parser.add_argument(
        "--loaders",
        nargs="+",
        choices=tuple(PLACES),
        default=["torch", "torch,own"],
        help="loaders to measure, those with processes first (default torch torch,own)",
    )
    parser.add_argument(
        "--expression", choices=("records", "table"), default="records", help="data.expression (default records)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds (default 7)")
    parser.add_argument("--steps", type=int, default=20, help="steps per block (default 20)")
    parser.add_argument("--control", action="store_true", help="also load the same batches in another process")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    load = os.getloadavg()
    shards = ShardSet(args.set)
    config = Setting(shards, args.workers, CALIBRATION_BATCH, 1, 1, args.panel).config
    tables = training_tables(shards, replace(config, data=replace(config.data, expression=args.expression)))
    if tables.genes.trained.size < args.panel:
        raise SystemExit(f"{shards.name}: {tables.genes.trained.size} trained genes; give a smaller --panel")
    with near_empty_trainer() as trainer:
        operators = operators_of_step(trainer)
        step_ms = run_block(trainer, args.steps, 2).step_ms
        rows = list(rows_of(args, tables, shards, step_ms))
        # The first batches were prepared before the step took one.
        warm = 2 + 4 + config.data.prefetch
        try:
            alone = measure(trainer, rows, args.rounds, args.steps, warm)
        finally:
            for row in rows:
                row.feed.close()
    _print(args, rows, alone, shards, operators, load)


def _print(
    args: argparse.Namespace,
    rows: Sequence[Row],
    alone: Sequence[Block],
    shards: ShardSet,
    operators: int,
    load: tuple[float, float, float],
) -> None:
    """Print the table and the setting."""
    table: list[Any] = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells(alone) for row in rows)]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in table))
    print(
        f"\n*{shards.manifest.tile.px} px tiles, panels of {args.panel} genes, data.expression={args.expression}, {args.workers} "
        f"workers; step of {operators} operators; {args.rounds} rounds of {args.steps} steps; load average before the start "
        f"{load[0]:.1f}; {describe_machine(len(os.sched_getaffinity(0)))}*"
    )


if __name__ == "__main__":
    main()
