"""``comtip export RUN --out DIR``: export the best model, or a checkpoint, as safetensors and config.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from comtip_fast.cli.options import add_out, out_folder, refuse_unused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``comtip export``."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        help="checkpoint to export: newest, best or a step; the run may still be in progress (default: the finished run's export)",
    )
    parser.add_argument(
        "--shards",
        action="append",
        help="with --checkpoint: the run's shard set; repeat it for a run on several sets (default: those in its config)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with --checkpoint: change a key of the readout, which is fitted at export, e.g. readout.kind=linear",
    )
    add_out(parser, "folder to write")


def run(args: argparse.Namespace) -> int:
    """Verify and copy the run's export, or export a checkpoint."""
    from comtip_fast.inference import Predictor

    if out_folder(args).exists() and any(args.out.iterdir()):
        raise FileExistsError(f"--out {args.out} exists and is not empty; give a new folder")
    if args.checkpoint is None:
        refuse_unused({"--shards": args.shards, "--set": args.set}, "used with --checkpoint only")
        if (args.run_dir / "checkpoints").is_dir() and not (args.run_dir / "export").is_dir():
            raise FileNotFoundError(
                f"{args.run_dir}: the run is not finished, so it has no export; export a checkpoint, e.g. --checkpoint newest"
            )
        Predictor.load(args.run_dir).bundle.save(args.out)
    else:
        from comtip_fast.training.export_checkpoint import export_checkpoint

        print(f"step {export_checkpoint(args.run_dir, args.checkpoint, args.out, args.shards, args.set)}")
    print(f"{args.out}: " + ", ".join(sorted(p.name for p in args.out.iterdir())))
    return 0
