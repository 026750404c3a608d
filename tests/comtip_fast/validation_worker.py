"""One rank of a validation: ``python validation_worker.py score|slow FOLDER OVERRIDE ...``; prints one JSON object."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from comtip_fast.config.io import load_config
from comtip_fast.models import CoMTIP
from comtip_fast.pretraining import pretrain
from comtip_fast.training.distributed.process_group import init_distributed, on_every_rank
from comtip_fast.training.task import build_task

SLOW_S = 12.0
"""Seconds for which the validation of rank 0 sleeps; more than ``engine.timeout_s`` of the test."""


def score(overrides: list[str]) -> dict[str, Any]:
    """Validate the initial weights over all ranks; then let rank 1 fail, which every rank has to report."""
    with init_distributed(60.0, "cpu") as group:
        task = build_task(load_config(None, overrides), torch.device("cpu"), group)
        task.model.eval()
        sections = [one.section for one in task.validation_share(lambda what: None)]
        result = on_every_rank(lambda: task.validation_share(lambda what: None), task.validation_result, group)

        def work() -> int:
            if group.rank == 1:
                raise OSError("the section cannot be read")
            return 1

        error = ""
        try:
            on_every_rank(work, sum, group)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        return {"result": result, "sections": sections, "error": error}


def slow(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train; the validation of rank 0 lasts longer than ``engine.timeout_s``."""
    encode, done = CoMTIP.encode_image, []

    def slowed(self: CoMTIP, features: torch.Tensor) -> Any:
        if not self.training and not done and torch.distributed.get_rank() == 0:
            done.append(True)
            time.sleep(SLOW_S)
        return encode(self, features)

    CoMTIP.encode_image = slowed  # type: ignore[method-assign]
    return {"step": pretrain(None, folder, overrides=overrides).step}


if __name__ == "__main__":
    mode, out, *settings = sys.argv[1:]
    torch.set_num_threads(1)
    print("\n" + json.dumps(score(settings) if mode == "score" else slow(Path(out), settings)))
