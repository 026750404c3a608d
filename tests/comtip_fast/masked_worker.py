"""One of several ranks that train as on GPUs: no reads between rows; used by test_host_waits.py.

``python masked_worker.py FOLDER OVERRIDES SIGNAL_STEP`` trains into FOLDER. Rank 1 asks to stop at SIGNAL_STEP, if it is not 0. Rank 0
prints the reads of the steps that log nothing, and the progress.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from comtip_fast.config.io import load_config
from comtip_fast.runtime import devices
from comtip_fast.training.distributed.process_group import init_distributed
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer
from testkit.host_reads import HostReads


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
        if group.rank == 0:
            print(json.dumps({"reads": reads, "step": result.step, "stopped": result.stopped}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]))
