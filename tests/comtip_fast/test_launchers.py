"""Whole runs under the launchers that the documents name (torchrun's agent: test_survival.py; SLURM: test_slurm.py)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from comtip_fast.config.io import dump_config, load_config
from comtip_fast.testing.distributed import free_port, rank_environment
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.slow
def test_deepspeeds_launcher_gives_the_losses_of_one_process(tiny_overrides: list[str], tmp_path: Path):
    """As docs/training.md starts it, its ``--local_rank`` included; and DeepSpeed compiles nothing for it."""
    settings = [*tiny_overrides, "train.steps=4", "train.device=cpu", "data.workers=1"]
    alone = load_config(None, settings)
    Trainer(build_task(alone, torch.device("cpu")), alone, tmp_path / "alone").fit()
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(load_config(None, [*settings, "engine.kind=deepspeed", "engine.zero_stage=2"])))
    programs = Path(sys.executable).parent
    # Binding needs numactl and a core for each rank; a machine that has neither still runs the rest.
    bind = ["--bind_cores_to_rank"] if shutil.which("numactl") and (psutil.cpu_count(logical=False) or 0) >= 2 else []
    launched = [
        str(programs / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), *bind, "--no_python",
        str(programs / "comtip"), "pretrain", "--config", str(config), "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    environment = rank_environment(0, 1, 0, {"TORCH_EXTENSIONS_DIR": str(tmp_path / "compiled")})
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del environment[name]
    environment["PATH"] = os.pathsep.join((str(programs), environment["PATH"]))
    done = subprocess.run(launched, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "FutureWarning" not in done.stderr, "DeepSpeed's use of PyTorch is no news to a user"
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert not list((tmp_path / "compiled").glob("*")), "compiled at the start of a run, a minute and more"
