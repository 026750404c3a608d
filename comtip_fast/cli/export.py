"""``comtip export RUN --out DIR``: the best checkpoint's model as safetensors and config.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from comtip_fast.cli.options import add_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run folder")
    add_out(parser, "folder to write")


def run(args: argparse.Namespace) -> int:
    """Read the run's export, which checks it, and write it again at the place asked for."""
    from comtip_fast.inference import Predictor

    if args.out.exists() and any(args.out.iterdir()):
        raise FileExistsError(f"--out {args.out} exists and is not empty; give a new folder")
    Predictor.load(args.run_dir).bundle.save(args.out)
    print(f"{args.out}: " + ", ".join(sorted(p.name for p in args.out.iterdir())))
    return 0
