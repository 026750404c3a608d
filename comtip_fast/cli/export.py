"""``comtip export RUN --out DIR``: the best checkpoint's model as safetensors and config.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from comtip_fast.cli.options import add_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        help="newest, best or a step: from a checkpoint, also of a run that has not ended",
    )
    parser.add_argument(
        "--shards", help="with --checkpoint: the run's shard set (default: the folder its config names)"
    )
    add_out(parser, "folder to write")


def run(args: argparse.Namespace) -> int:
    """Read the run's export, which checks it, and write it again at the place asked for."""
    from comtip_fast.inference import Predictor

    if args.out.exists() and any(args.out.iterdir()):
        raise FileExistsError(f"--out {args.out} exists and is not empty; give a new folder")
    if args.checkpoint is None:
        Predictor.load(args.run_dir).bundle.save(args.out)
    else:
        from comtip_fast.training.export_checkpoint import export_checkpoint

        print(f"step {export_checkpoint(args.run_dir, args.checkpoint, args.out, args.shards)}")
    print(f"{args.out}: " + ", ".join(sorted(p.name for p in args.out.iterdir())))
    return 0
