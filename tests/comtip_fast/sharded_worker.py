"""One of several ranks that train a stand-in under ZeRO 3 with checkpoints in parts; used by test_sharded_checkpoints.py.

sharded_worker.py FOLDER train NAME=OVERRIDE;OVERRIDE ...    train into FOLDER/NAME. A run whose name ends with ``-stopped`` is
                                                             stopped by a signal to the last rank at step 6, and resumed; if it
                                                             begins with ``late``, it averages from then on. That of the name
                                                             ``full`` fails to write the last rank's part of step 8
sharded_worker.py FOLDER load NAME                           resume FOLDER/NAME and write what was loaded to FOLDER/loaded

Runs average their weights. The validation of step 8 has the best score, that of step 12 the score of the weights.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from comtip_fast.collectives import Group
from comtip_fast.training.checkpoint import shard_saver
from comtip_fast.training.checkpoint.parts.writer import RankPart, Written
from comtip_fast.training.distributed.failures import RestartError
from comtip_fast.training.distributed.process_group import init_distributed
from comtip_fast.training.trainer import Trainer
from tests.comtip_fast.trainer_standin import StandIn, config_of

STEPS, STOP = 12, 6
ZERO3 = ["engine.kind=deepspeed", "engine.zero_stage=3"]
SETTINGS = [
    f"train.steps={STEPS}",
    "train.validate_every=4",
    "train.checkpoint_every=4",
    "train.keep_checkpoints=2",
    "optim.weight_decay=0.1",
    "optim.ema=0.8",
]


class Net(nn.Module):
    """Parameters whose sizes are no multiples of the ranks, a frozen one that changes, buffers, one of them without a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Dropout(0.2), nn.Linear(7, 1))
        self.frozen = nn.Linear(4, 7).requires_grad_(False)
        self.register_buffer("teacher", torch.zeros(3, 5))
        self.register_buffer("count", torch.tensor(0))


class Sharded(StandIn):
    """A stand-in whose ranks have equal shares of the loss."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        torch.manual_seed(3)
        self.module = Net()
        self.scores = {4: 1.0, 8: 2.0}

    def losses(self, module: Net, batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        x, y = batch
        loss = (module.body(x) + module.frozen(x).mean(1, keepdim=True) - y).square().mean()
        loss = loss / int(os.environ["WORLD_SIZE"])
        return {"loss": loss, "nce": loss}, {}

    @torch.no_grad()
    def after_step(self, module: Net, step: int, good: Tensor | None = None) -> None:
        module.frozen.weight.lerp_(module.body[0].weight, 0.1)
        module.teacher.add_(step)
        module.count.add_(1)


def trainer_of(folder: Path, settings: list[str], group: Group, stop: int = 0) -> Trainer:
    """Return the trainer of a run; at step ``stop`` the last rank receives a SIGTERM."""
    config = config_of(*SETTINGS, *ZERO3, *settings)
    last = group.rank == group.size - 1

    def at_step(step: int) -> None:
        if step == stop and last:
            os.kill(os.getpid(), signal.SIGTERM)

    return Trainer(Sharded(config, at_step), config, folder, group)


def fill_the_disk(folder: Path, settings: list[str], group: Group) -> None:
    """Train until the disk of the last rank is full at step 8, which every rank reports."""
    real = shard_saver.write_part

    def write_part(parts: Path, part: RankPart) -> Written:
        if part.rank == group.size - 1 and "-00000008-" in f"{parts}":
            raise OSError(28, "No space left on device")
        return real(parts, part)

    shard_saver.write_part, message = write_part, ""
    try:
        trainer_of(folder, settings, group).fit()
    except RestartError as error:
        message = str(error)
    shard_saver.write_part = real
    assert "step_00000008: cannot write this checkpoint" in message, message
    assert "the checkpoint of step 4 is unchanged" in message, message
    assert message.startswith("rank 1: ") == (group.rank == 0), message


def load(folder: Path, name: str, group: Group) -> None:
    """Resume a run without a step, and write weights, buffers, optimizer state and averages, gathered, to a file."""
    trainer = trainer_of(folder / name, ["train.steps=40"], group)
    assert trainer._saver.in_parts or group.size == 1
    trainer._start(resume=True)
    optim = trainer.engine.optimizer_state(every_rank=True)
    with trainer.engine.gathered_for_read():
        weights = {f"model/{k}": v.clone() for k, v in trainer.task.module.state_dict().items()}
    averages = trainer._average.tensors()
    with trainer.engine.gathered_for_read(averages=averages):
        named = trainer.task.module.named_parameters()
        weights |= {f"ema/{k}": p.detach().clone() for k, p in named if k in averages}
    if group.rank == 0:
        save_file(weights | {f"optim/{k}": v for k, v in optim.items()}, folder / "loaded")


def main(folder: Path, what: str, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    import faulthandler

    faulthandler.dump_traceback_later(30)
    logging.getLogger("comtip_fast").setLevel(logging.ERROR)
    with init_distributed(600.0, "cpu") as group:
        if what == "load":
            load(folder, arguments[0], group)
            return
        for argument in arguments:
            name, _, overrides = argument.partition("=")
            settings = [text for text in overrides.split(";") if text]
            if name == "full":
                fill_the_disk(folder / name, settings, group)
            if name.endswith("-stopped"):
                first = [*settings, "optim.ema=null"] if name.startswith("late") else settings
                assert trainer_of(folder / name, first, group, STOP).fit().step == STOP
            trainer_of(folder / name, settings, group).fit(resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
