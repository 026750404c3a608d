"""``comtip bench``: ``loader`` measures loaders, ``step`` measures training steps, and ``hest`` scores encoders on HEST-Benchmark."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from comtip_fast.benchmarks.hest.variants import VARIANTS
from comtip_fast.cli.options import add_device, add_out, at_least, out_folder, refuse_unused
from comtip_fast.constants import ENCODER_HELP

if TYPE_CHECKING:
    from comtip_shards import ShardSet

SAMPLES = Path("data_shards/samples")
SOURCE_HELP = f"sections to build the shard set from (default {SAMPLES})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their options."""
    sub = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    loader = sub.add_parser(
        "loader",
        help="measure spots per second of each loader and each decoder on a shard set",
        description="Measure each loader and decoder on a shard set; docs/data_loading.md explains the table.",
    )
    loader.add_argument("--shards", type=Path, help="shard set to read (default: build one from --source)")
    loader.add_argument("--source", type=Path, help=SOURCE_HELP)
    loader.add_argument("--px", type=int, help="tile width in px of the built set (default 224)")
    loader.add_argument(
        "--work",
        type=Path,
        default=Path("runs/bench_loader"),
        help="folder for the built shard set (default runs/bench_loader)",
    )
    loader.add_argument("--out", type=Path, help="folder for the result files (default: the --work folder)")
    loader.add_argument("--workers", type=int, default=2, help="threads or processes per loader or decoder (default 2)")
    loader.add_argument("--batch-size", type=int, default=64, help="spots per batch (default 64)")
    loader.add_argument("--rounds", type=int, default=5, help="repetitions (default 5)")
    loader.add_argument("--spots", type=int, default=2000, help="spots per round and loader or decoder (default 2000)")
    loader.add_argument(
        "--panel", type=at_least(1), help="genes per batch, whose levels are decoded (default: at most 256)"
    )
    loader.add_argument(
        "--epochs", type=at_least(0), default=20, help="epochs to measure memory over (default 20; 0: do not measure)"
    )
    loader.set_defaults(act=_loader)
    _add_step(sub)
    _add_hest(sub)


def _add_step(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand ``comtip bench step``."""
    step = sub.add_parser(
        "step",
        help="compare a training step with plain PyTorch, open_clip and a BLEEP-like step",
        description="Compare a training step with others on the same tiles; docs/performance.md explains the table.",
    )
    step.add_argument("--config", type=Path, required=True, help="a YAML file, e.g. configs/demo_cpu.yaml")
    step.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    step.add_argument("--shards", type=Path, help="shard set to read (default: build one from --source)")
    step.add_argument("--source", type=Path, help=SOURCE_HELP)
    step.add_argument("--px", type=int, help="tile width in px of the built set (default 128)")
    step.add_argument(
        "--work",
        type=Path,
        default=Path("runs/bench_step"),
        help="folder for the built shard set (default runs/bench_step)",
    )
    step.add_argument("--out", type=Path, help="folder for the table and the profiles (default: the --work folder)")
    step.add_argument(
        "--steps",
        nargs="+",
        default=["ours", "plain", "open_clip", "bleep"],
        metavar="STEP",
        help="steps to measure: ours, plain, open_clip, bleep (default: all; ours is always measured)",
    )
    step.add_argument("--rounds", type=int, default=5, help="repetitions (default 5)")
    step.add_argument(
        "--per-round", type=int, default=2, help="training steps per round and implementation (default 2)"
    )
    add_device(step)
    step.set_defaults(act=_step)


def _add_hest(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand ``comtip bench hest``."""
    hest = sub.add_parser(
        "hest",
        help="score image encoders on a folder in the layout of HEST-Benchmark",
        description="Score image encoders on a folder in the layout of HEST-Benchmark; docs/evaluation.md explains the recipe.",
    )
    hest.add_argument("folder", type=Path, metavar="FOLDER", help="folder with one subfolder per task")
    hest.add_argument("--encoder", dest="encoders", nargs="+", required=True, metavar="ENCODER", help=ENCODER_HELP)
    add_out(hest, "folder for hest.json, hest_folds.csv and hest_genes.csv")
    hest.add_argument("--tasks", nargs="+", metavar="TASK", help="subfolders to score (default: all)")
    hest.add_argument(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        help="; ".join(f"{v.name}: {v.meaning}" for v in VARIANTS.values()) + " (default: all)",
    )
    hest.add_argument(
        "--whole-patch",
        action="store_true",
        help="resize complete patches (112 um) for a run whose tiles have another width; recorded in hest.json",
    )
    hest.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="precision of timm models and lite0 (default auto: bf16 on a GPU); a run uses its own",
    )
    add_device(hest)
    hest.set_defaults(act=_hest)


def run(args: argparse.Namespace) -> int:
    """Run ``loader``, ``step`` or ``hest``, and return the exit code."""
    return int(args.act(args))


def _check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for the first of the named options that is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")


def _open_set(args: argparse.Namespace, px: int) -> ShardSet:
    """Open ``--shards``, or build a set from ``--source`` (default :data:`SAMPLES`) with tiles of ``--px`` px (default ``px``)."""
    from comtip_fast.benchmarks.loaders import open_set

    if args.out is not None:
        out_folder(args)
    if args.shards is not None:
        refuse_unused({"--source": args.source, "--px": args.px}, "the set of --shards is built already")
    if args.px is not None and not 8 <= args.px <= 4096:
        raise ValueError(f"--px {args.px}: give a width from 8 to 4096 px")
    source = SAMPLES if args.source is None else args.source
    if args.shards is None and args.source is None and not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist in the current folder; give sections with --source, or --shards"
        )
    return open_set(args.shards, source, args.work, px if args.px is None else args.px)


def _loader(args: argparse.Namespace) -> int:
    """Measure the loaders, print the table and write the results."""
    import torch

    from comtip_fast.benchmarks import loaders

    _check_positive(args, "workers", "batch_size", "rounds", "spots")
    torch.set_num_threads(1)
    shards = _open_set(args, 224)
    setting = loaders.Setting(shards, args.workers, args.batch_size, args.rounds, args.spots, args.panel)
    resident = loaders.memory(setting, args.epochs) if args.epochs else {}
    contenders = loaders.contenders_of(setting, loaders.load_inputs(setting))
    loaders.measure(setting, contenders)
    for line in loaders.table_of(contenders, resident):
        print(line)
    out = args.out or args.work
    loaders.write_results(out, setting, contenders, resident)
    print(f"wrote {out / 'results.csv'}" + (f" and {out / 'memory.csv'}" if resident else ""))
    return 0


def _step(args: argparse.Namespace) -> int:
    """Measure the training steps, print the table and write the results."""
    from comtip_fast.benchmarks.step.measure import table_of, write_results
    from comtip_fast.benchmarks.step.run import benchmark_step, config_of

    _check_positive(args, "rounds", "per_round")
    shards = _open_set(args, 128)
    config, out = config_of(args.config, args.set, shards, args.device), args.out or args.work
    found = benchmark_step(config, args.steps, rounds=args.rounds, per_round=args.per_round, out=out)
    for line in table_of(found):
        print(line)
    setting = (
        f"{args.config.name} {' '.join(args.set)}: batches of {config.data.batch_size}, {config.panel.max_genes} genes, "
        f"{config.levels.n_levels} levels, {shards.manifest.tile.px} px, {args.rounds} rounds of {args.per_round} steps"
    )
    print(f"wrote {write_results(out, found, setting)} and a profile of each step in the same folder")
    return 0


def _hest(args: argparse.Namespace) -> int:
    """Score the encoders, print the table and write the results."""
    from comtip_fast.benchmarks.hest.run import benchmark_hest

    out_folder(args)
    scores = benchmark_hest(
        args.folder,
        args.encoders,
        tasks=args.tasks,
        variants=args.variants,
        whole_patch=args.whole_patch,
        precision=args.precision,
        device=args.device,
    )
    scores.write(args.out)
    print(scores.table())
    print(f"wrote {args.out / 'hest.json'}, {args.out / 'hest_folds.csv'} and {args.out / 'hest_genes.csv'}")
    return 0
