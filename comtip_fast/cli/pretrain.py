"""``comtip pretrain --config FILE --out RUN``: train a model on a shard set."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from comtip_fast.cli import BAD_INPUT, KILLED, USER_ERROR
from comtip_fast.cli.options import add_out, out_folder
from comtip_fast.runtime.streams import write_line

log = logging.getLogger("comtip_fast")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``comtip pretrain``."""
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, e.g. configs/demo_cpu.yaml")
    add_out(parser, "folder of the run")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, e.g. train.seed=1",
    )
    parser.add_argument(
        "--from",
        dest="start_from",
        type=Path,
        metavar="EXPORT",
        help="initial weights: an export or a finished run",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu or cuda, to replace train.device; auto keeps train.device (default auto)"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest valid checkpoint in --out")


def run(args: argparse.Namespace) -> int:
    """Train, and return the exit code: 0, 75 for a failure that a restart can fix, or 143 if a signal stopped the run.

    Bad input raises one of :data:`BAD_INPUT`, for which ``main`` returns 2. torchrun restarts a rank after any error; if a
    restart cannot fix the input, the next start prints the message again and returns 2 at once, see :class:`RestartGuard`.
    """
    from comtip_fast.training.distributed.restart_guard import RestartGuard

    guard = RestartGuard([*map(str, (args.config, args.out, args.start_from)), *args.overrides])
    known = guard.known()
    if known is not None:
        write_line(f"comtip: error: {args.with_options(known)}", sys.stderr)
        return USER_ERROR
    try:
        return _train_or_explain(args)
    except BAD_INPUT as error:
        guard.note(str(error), begun=any((args.out / "checkpoints").glob("step_*")))
        raise


def _train_or_explain(args: argparse.Namespace) -> int:
    """Train, and return the exit code; print the message of an error that a restart can fix."""
    from comtip_fast.training.distributed.failures import RESTART_CODE, RestartError

    try:
        return _train(args)
    except RestartError as error:
        if args.debug:
            raise
        write_line(f"comtip: error: {args.with_options(str(error))}", sys.stderr)
        return RESTART_CODE


def _train(args: argparse.Namespace) -> int:
    """Train, print the result as JSON on rank 0, and return the exit code."""
    from comtip_fast.metrics import finite_or_none
    from comtip_fast.pretraining import pretrain
    from comtip_fast.training.distributed.process_group import distributed_env

    result = pretrain(
        args.config,
        out_folder(args),
        overrides=args.overrides,
        start_from=args.start_from,
        resume=args.resume,
        device=args.device,
    )
    if result.stopped == "sigterm":
        log.info("stopped at step %d by a signal; continue with --resume", result.step)
        return KILLED
    if distributed_env().rank == 0:
        # All results are on disk: a closed standard output does not fail the run.
        write_line(json.dumps(finite_or_none(asdict(result)), allow_nan=False), sys.stdout)
    return 0
