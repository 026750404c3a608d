"""``comtip pretrain --config FILE --out RUN``: the training story, told once."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from comtip_fast.cli import BAD_INPUT, KILLED, USER_ERROR
from comtip_fast.cli.options import add_out

log = logging.getLogger("comtip_fast")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, e.g. configs/demo_cpu.yaml")
    add_out(parser, "folder of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. train.seed=1"
    )
    parser.add_argument(
        "--from",
        dest="start_from",
        type=Path,
        metavar="EXPORT",
        help="begin with the weights of an export or finished run",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint of --out")


def run(args: argparse.Namespace) -> int:
    """Train; a failure that a fresh start mends is said in one sentence and has its own exit code.

    Bad input is not tried again, although torchrun would.
    """
    from comtip_fast.training.distributed.restart_guard import RestartGuard

    refusals = RestartGuard([*map(str, (args.config, args.out, args.start_from)), *args.set])
    known = refusals.known()
    if known is not None:
        print(f"comtip: error: {known}", file=sys.stderr)
        return USER_ERROR
    try:
        return _train_or_say(args)
    except BAD_INPUT as error:
        refusals.note(str(error), begun=any((args.out / "checkpoints").glob("step_*")))
        raise


def _train_or_say(args: argparse.Namespace) -> int:
    from comtip_fast.training.distributed.failures import RESTART_CODE, RestartError

    try:
        return _train(args)
    except RestartError as error:
        if args.debug:
            raise
        print(f"comtip: error: {error}", file=sys.stderr)
        return RESTART_CODE


def _train(args: argparse.Namespace) -> int:
    """Load the config, build the task, train, export the best weights."""
    import torch

    from comtip_fast.config.io import load_config
    from comtip_fast.plan.live import step_cost
    from comtip_fast.training.distributed.comm_timer import ClockedGroup
    from comtip_fast.training.distributed.process_group import init_distributed
    from comtip_fast.training.engines.base import set_product_precision
    from comtip_fast.training.engines.factory import check_engine
    from comtip_fast.training.task import build_task, pick_device
    from comtip_fast.training.trainer import Trainer, refuse_second_run

    begin = [] if args.start_from is None else [f"train.start_from={json.dumps(str(args.start_from))}"]
    config = load_config(args.config, [*args.set, *begin])
    refuse_second_run(args.out, args.resume)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device = pick_device(config.train.device)
    check_engine(config, device)
    set_product_precision(config, device)
    with init_distributed(config.engine.timeout_s, config.train.device) as ranks:
        group = ClockedGroup(ranks, device)
        if group.rank > 0:
            log.setLevel(logging.WARNING)
        task = build_task(config, device, group)
        log.info("%s", task.describe())
        cost = step_cost(
            config, task.model, tile_px=task.sizes.tile_px, trained_genes=task.sizes.n_identities, ranks=group.size
        )
        result = Trainer(task, config, args.out, group, cost=cost).fit(resume=args.resume)
    if result.stopped == "sigterm":
        log.info("stopped at step %d by a signal; go on with --resume", result.step)
        return KILLED
    summary = {
        "step": result.step,
        "best_step": result.best_step,
        "best_score": result.best_score,
        "stopped": result.stopped,
    }
    if group.rank == 0:
        print(json.dumps(summary))
    return 0
