"""One rank of a run: ``further_sets_worker.py FOLDER END OVERRIDE ...`` resumes it, and exits as if killed when step END begins.

Rank 0 prints the spots of each step that it began, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comtip_fast.pretraining import pretrain
from comtip_fast.training.task import CoMTIPTask


class Killed(BaseException):
    """The run ends here; no library code catches it."""


def record_and_kill(seen: dict[int, tuple[int, list[int]]], end: int | None) -> Any:
    """Return a replacement of ``CoMTIPTask.batch`` that records epoch and spots of each step, and raises at step ``end``."""
    original = CoMTIPTask.batch

    def batch(self: CoMTIPTask, spot_index: np.ndarray, step: int, epoch: int) -> Any:
        if step == end:
            raise Killed
        seen[step] = epoch, spot_index.tolist()
        return original(self, spot_index, step, epoch)

    return batch


if __name__ == "__main__":
    folder, last, *settings = sys.argv[1:]
    torch.set_num_threads(1)
    steps: dict[int, tuple[int, list[int]]] = {}
    CoMTIPTask.batch = record_and_kill(steps, int(last))  # type: ignore[method-assign]
    with suppress(Killed):
        pretrain(None, Path(folder), overrides=settings, resume=True, device="cpu")
    print("\n" + json.dumps(steps), flush=True)
    os._exit(0)  # without the shutdown of a rank that ended
