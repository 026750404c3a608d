"""One of several ranks that freeze and thaw parameters, stop and resume; used by test_freezing.py.

``thaw_worker.py FOLDER`` prints, as JSON, the losses and the first message of every run, and how many checkpoints this rank opened.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from comtip_fast.collectives import Group
from comtip_fast.training.checkpoint import store
from comtip_fast.training.distributed.failures import RestartError
from comtip_fast.training.distributed.process_group import init_distributed
from comtip_fast.training.protocol import TrainingError
from comtip_fast.training.trainer import Trainer
from tests.comtip_fast.trainer_standin import Net, StandIn, config_of

THAWS = "optim.freeze=[[body.0, 6]]"


class Plain(StandIn):
    """A stand-in without dropout and teacher, which reads the module of the engine."""

    def losses(self, module: Net, batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        x, y = batch
        loss = (module.body(x) - y).square().mean() / int(os.environ["WORLD_SIZE"])
        return {"loss": loss, "nce": loss}, {}

    def after_step(self, module: Net, step: int, good: Tensor | None = None) -> None:
        """Do nothing."""


def fit(group: Group, folder: Path, *settings: str, resume: bool = False, stop_at: int = 0) -> None:
    config = config_of("train.steps=10", "train.validate_every=0", *settings)
    last = group.rank == group.size - 1
    task = Plain(config, lambda step: os.kill(os.getpid(), signal.SIGTERM) if last and step == stop_at else None)
    task.module.body[2].p = 0.0
    Trainer(task, config, folder, group).fit(resume=resume)


def zero(stage: int) -> list[str]:
    return ["engine.kind=deepspeed", f"engine.zero_stage={stage}"]


def through_the_thaw(group: Group, folder: Path, stage: int) -> str:
    """Run until parameters thaw, then resume to the end; return the message of the first end."""
    try:
        fit(group, folder, *zero(stage), THAWS)
    except RestartError as error:
        fit(group, folder, *zero(stage), THAWS, resume=True)
        return str(error)
    return ""


def thawed_by_the_user(group: Group, folder: Path, stage: int) -> str:
    """Run with frozen parameters, stop after step 6 and resume without the rule, then with its step; return the first message."""
    fit(group, folder, *zero(stage), "optim.freeze=[[body.0, 0]]", stop_at=6)
    try:
        fit(group, folder, *zero(stage), resume=True)
        message = ""
    except TrainingError as error:
        message = str(error)
    fit(group, folder, *zero(stage), THAWS, resume=True)
    return message


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger("comtip_fast").setLevel(logging.ERROR)
    with init_distributed(300.0, "cpu") as group, patch.object(store, "open_reader", wraps=store.open_reader) as opened:
        fit(group, folder / "ddp", "engine.kind=ddp", THAWS, stop_at=8)
        fit(group, folder / "ddp", "engine.kind=ddp", THAWS, resume=True)
        out = {"ddp": [losses(folder / "ddp"), ""]}
        for stage in (1, 3):
            for work in (through_the_thaw, thawed_by_the_user):
                name = f"{work.__name__}{stage}"
                message = work(group, folder / name, stage)
                out[name] = [losses(folder / name), message]
    print(json.dumps([out, opened.call_count]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
