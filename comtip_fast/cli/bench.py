"""``comtip bench loader``: measure, on this machine, what a document claims."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be measured."""
    sub = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    loader = sub.add_parser(
        "loader",
        help="spots per second of the loaders, beside webdataset + PIL, h5 files and the decoders alone",
        description="Measure loaders side by side; docs/data.md explains the table.",
    )
    loader.add_argument("--shards", type=Path, help="shard set to read (default: build one from --source)")
    loader.add_argument("--source", type=Path, default=Path("data_shards/samples"), help="sections to build it from")
    loader.add_argument("--px", type=int, default=224, help="width of a tile in px (default 224)")
    loader.add_argument("--work", type=Path, default=Path("runs/bench_loader"), help="folder for what is built")
    loader.add_argument("--out", type=Path, help="folder for results.csv and memory.csv (default: the --work folder)")
    loader.add_argument("--workers", type=int, default=2, help="threads or processes of each contender (default 2)")
    loader.add_argument("--batch-size", type=int, default=64)
    loader.add_argument("--rounds", type=int, default=5)
    loader.add_argument("--spots", type=int, default=2000, help="spots per round and contender (default 2000)")
    loader.add_argument(
        "--rate", type=float, default=100.0, help="storage rate of the slow rows in MB/s (default 100; 0: none)"
    )
    loader.add_argument("--epochs", type=int, default=20, help="epochs over which memory is watched (0: none)")
    loader.set_defaults(act=_loader)


def run(args: argparse.Namespace) -> int:
    """Carry out the sub-command."""
    return int(args.act(args))


def _loader(args: argparse.Namespace) -> int:
    import torch

    from comtip_fast.benchmarks import loaders

    if min(args.workers, args.batch_size, args.rounds, args.spots) < 1:
        raise ValueError("--workers, --batch-size, --rounds and --spots must be at least 1")
    torch.set_num_threads(1)
    shards = loaders.open_set(args.shards, args.source, args.work, args.px)
    setting = loaders.Setting(shards, args.work, args.workers, args.batch_size, args.rounds, args.spots, args.rate)
    resident = loaders.memory(setting, args.epochs) if args.epochs else {}
    contenders = loaders.measure(setting)
    for line in loaders.table_of(contenders, resident):
        print(line)
    out = args.out or args.work
    loaders.write_results(out, setting, contenders, resident)
    print(f"written: {out / 'results.csv'}" + (f" and {out / 'memory.csv'}" if resident else ""))
    return 0
