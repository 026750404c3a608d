"""One of several ranks that meet a spike of the gradient norm under every engine; used by test_update.py.

``python spike_worker.py FOLDER`` trains the stand-in into FOLDER. Rank 0 prints, by policy and engine, the losses, and the numbers of
skipped steps and spikes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from comtip_fast.training.distributed.process_group import init_distributed
from comtip_fast.training.trainer import Trainer
from tests.comtip_fast.trainer_standin import Net, StandIn, config_of

AT, STEPS = 25, 30


class Spiking(StandIn):
    """A stand-in whose ranks have equal shares of the loss, which is a thousand times larger in one step."""

    def losses(self, module: Net, batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        x, y = batch
        loss = (module.body(x) - y).square().mean() / int(os.environ["WORLD_SIZE"])
        return {"loss": loss * (1000 if self.step == AT else 1), "nce": loss}, {}

    def after_step(self, module: Net, step: int, good: Tensor | None = None) -> None:
        """Do nothing."""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    out: dict[str, dict[str, list[list[float]]]] = {}
    with init_distributed(300.0, "cpu") as group:
        for policy in ("skip", "clip"):
            for name in ("ddp", "zero0", "zero1", "zero2", "zero3"):
                kind = "ddp" if name == "ddp" else f"deepspeed,engine.zero_stage={name[-1]}"
                settings = [
                    f"train.steps={STEPS}",
                    "train.validate_every=0",
                    "train.checkpoint_every=99",
                    "optim.clip=0",
                ]
                settings += [f"optim.spike.policy={policy}", *f"engine.kind={kind}".split(",")]
                config, run = config_of(*settings), folder / policy / name
                task = Spiking(config)
                task.module.body[2].p = 0.0
                Trainer(task, config, run, group).fit()
                if group.rank == 0:
                    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                    found = [[r["loss"], r["grad_norm"], r["skips"], r["spikes"]] for r in rows]
                    out.setdefault(policy, {})[name] = found
        if group.rank == 0:
            print(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
