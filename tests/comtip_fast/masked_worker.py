"""One of several ranks that train as on GPUs: no reads between rows; used by test_host_waits.py.

``python masked_worker.py FOLDER OVERRIDES SIGNAL_STEP`` trains into FOLDER. Rank 1 asks to stop at SIGNAL_STEP, if it is not 0. Rank 0
prints the reads of the steps that log nothing, and the progress. Without a signal, every rank also compares bf16 steps whose weights are
cast a block at a time with steps under autocast's own casts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from comtip_fast.collectives import Group
from comtip_fast.config.io import load_config
from comtip_fast.runtime import devices
from comtip_fast.training.distributed.process_group import init_distributed
from comtip_fast.training.engines import torch as torch_engine
from comtip_fast.training.engines.base import cast_groups_of
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer
from testkit.host_reads import HostReads


def bf16_steps(overrides: list[str], group: Group, together: bool) -> tuple[int, list[torch.Tensor]]:
    """Return the number of groups of weights that are cast in one call, and the losses and gradients of two steps."""
    config, device = load_config(None, [*overrides, "train.precision=bf16"]), torch.device("cpu")
    groups: list[int] = []

    def counted(*args: Any) -> list[Any]:
        found = cast_groups_of(*args) if together else []
        groups.append(len(found))
        return found

    with mock.patch.object(torch_engine, "cast_groups_of", counted):
        task = build_task(config, device, group)
        engine = make_engine(task.module, config, group)
    engine.module.train()
    out: list[torch.Tensor] = []
    for step, pieces in ((1, 1), (2, 2)):
        engine.start_step(1e-3)
        losses, _ = forward_backward(engine, task, task.batch(task.batches(0)[0], step, 0), pieces)
        out += [*losses.values(), *(p.grad.clone() for p in engine.module.parameters() if p.grad is not None)]
        engine.update(True)
    task.close()
    return groups[0], out


def main(folder: Path, overrides: list[str], signal_step: int) -> None:
    devices.reads_are_free = lambda device: False
    torch.set_num_threads(1)
    config = load_config(None, overrides)
    with init_distributed(120.0, "cpu") as group:
        trainer = Trainer(build_task(config, torch.device("cpu"), group), config, folder, group)
        one_step, reads = trainer._one_step, {}

        def watched(caught: Any) -> None:
            step = trainer.progress.step + 1
            if group.rank == 1 and step == signal_step:
                os.kill(os.getpid(), signal.SIGTERM)
            # The group exchanges flags between hosts, in host memory.
            with HostReads("batch", "any") as found:
                one_step(caught)
            if not trainer._reporter._is_logged(step):
                reads[step] = found.found

        trainer._one_step = watched  # type: ignore[method-assign]
        result = trainer.fit()
        found: dict[str, Any] = {"reads": reads, "step": result.step, "stopped": result.stopped}
        if not signal_step:
            (groups, cast), (none, own) = (bf16_steps(overrides, group, together) for together in (True, False))
            same = len(cast) == len(own) and all(torch.equal(a, b) for a, b in zip(cast, own, strict=True))
            found |= {"cast_groups": [groups, none], "compared": len(cast), "same_bits": same}
        print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]))
