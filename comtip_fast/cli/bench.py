"""``comtip bench loader``: measure the loaders on this machine and its storage."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their options."""
    sub = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    loader = sub.add_parser(
        "loader",
        help="measure spots per second of each loader and each decoder on a shard set",
        description="Measure each loader and decoder on a shard set; docs/data_loading.md explains the table.",
    )
    loader.add_argument("--shards", type=Path, help="shard set to read (default: build one from --source)")
    loader.add_argument(
        "--source", type=Path, default=Path("data_shards/samples"), help="sections from which it is built"
    )
    loader.add_argument("--px", type=int, default=224, help="tile width in px (default 224)")
    loader.add_argument("--work", type=Path, default=Path("runs/bench_loader"), help="folder for the built shard set")
    loader.add_argument("--out", type=Path, help="folder for the result files (default: the --work folder)")
    loader.add_argument("--workers", type=int, default=2, help="threads or processes per loader or decoder (default 2)")
    loader.add_argument("--batch-size", type=int, default=64, help="spots per batch (default 64)")
    loader.add_argument("--rounds", type=int, default=5, help="repetitions (default 5)")
    loader.add_argument("--spots", type=int, default=2000, help="spots per round and loader or decoder (default 2000)")
    loader.add_argument("--epochs", type=int, default=20, help="epochs over which memory is recorded (0: none)")
    loader.set_defaults(act=_loader)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    return int(args.act(args))


def _loader(args: argparse.Namespace) -> int:
    import torch

    from comtip_fast.benchmarks import loaders

    if min(args.workers, args.batch_size, args.rounds, args.spots) < 1:
        raise ValueError("--workers, --batch-size, --rounds and --spots must be at least 1")
    torch.set_num_threads(1)
    shards = loaders.open_set(args.shards, args.source, args.work, args.px)
    setting = loaders.Setting(shards, args.workers, args.batch_size, args.rounds, args.spots)
    resident = loaders.memory(setting, args.epochs) if args.epochs else {}
    contenders = loaders.contenders_of(setting, loaders.load_inputs(setting))
    loaders.measure(setting, contenders)
    for line in loaders.table_of(contenders, resident):
        print(line)
    out = args.out or args.work
    loaders.write_results(out, setting, contenders, resident)
    print(f"wrote {out / 'results.csv'}" + (f" and {out / 'memory.csv'}" if resident else ""))
    return 0
