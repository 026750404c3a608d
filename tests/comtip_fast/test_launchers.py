"""Runs under the documented launchers (torchrun's agent: test_survival.py; SLURM: test_slurm.py)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch

from comtip_fast.config.io import dump_config, load_config
from comtip_fast.training.distributed.restart_guard import RestartGuard
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer
from testkit.distributed import free_port, rank_environment

# Variables that a launcher sets.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.slow
def test_deepspeeds_launcher_gives_the_losses_of_one_process(tiny_overrides: list[str], tmp_path: Path):
    """The command of docs/training.md, including ``--local_rank``; DeepSpeed compiles nothing for it."""
    settings = [*tiny_overrides, "train.steps=4", "train.device=cpu", "data.workers=1"]
    single = load_config(None, settings)
    Trainer(build_task(single, torch.device("cpu")), single, tmp_path / "single").fit()
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(load_config(None, [*settings, "engine.kind=deepspeed", "engine.zero_stage=2"])))
    programs = Path(sys.executable).parent
    # Binding needs numactl and one core per rank; without them the rest of the test still runs.
    bind = ["--bind_cores_to_rank"] if shutil.which("numactl") and (psutil.cpu_count(logical=False) or 0) >= 2 else []
    launched = [
        str(programs / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        *bind,
        "--no_python",
        str(programs / "comtip"),
        "pretrain",
        "--config",
        str(config),
        "--out",
        str(tmp_path / "run"),
    ]
    environment = {k: v for k, v in rank_environment(0, 1, 0).items() if k not in RANKS}
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "compiled")
    environment["PATH"] = os.pathsep.join((str(programs), environment["PATH"]))
    done = subprocess.run(launched, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "FutureWarning" not in done.stderr, "DeepSpeed's use of PyTorch must not be shown to users"
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "single"), rel=1e-5)
    assert not list((tmp_path / "compiled").glob("*")), "compiled at the start of a run, which takes minutes"


def agent(start: int) -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": "r",
        "LOCAL_RANK": "0",
        "TORCHELASTIC_RESTART_COUNT": str(start),
        "TORCHELASTIC_MAX_RESTARTS": "3",
    }


def test_bad_input_is_final_before_the_first_checkpoint_and_the_second_time_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command = ["c.yaml", "run"]
    RestartGuard(command, agent(0)).note("no such file", begun=False)
    assert "no such file (restart 1 of 3 stopped" in str(RestartGuard(command, agent(1)).known())
    assert RestartGuard(["other.yaml", "run"], agent(1)).known() is None
    assert RestartGuard(command, agent(0)).known() is None, "a new agent starts without a note"
    RestartGuard(command, agent(0)).note("in use", begun=True)
    assert RestartGuard(command, agent(1)).known() is None
    RestartGuard(command, agent(1)).note("in use", begun=True)
    assert RestartGuard(command, agent(2)).known() is not None
    assert RestartGuard(command, agent(3)).known() is not None
    assert list(tmp_path.iterdir()) == [], "the last restart removes the note"
    RestartGuard(command, {}).note("no such file", begun=False)
    assert list(tmp_path.iterdir()) == [], "no note is written outside of torchrun"


@pytest.mark.slow
def test_bad_input_ends_torchrun_quickly(tmp_path: Path):
    """Three restarts: the first start finds the error, the others repeat it without importing PyTorch."""
    config = tmp_path / "c.yaml"
    config.write_text("data:\n  shards: no-such-set\n")
    programs = Path(sys.executable).parent
    launched = [
        str(programs / "torchrun"),
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "3",
        "--no-python",
        str(programs / "comtip"),
        "pretrain",
        "--config",
        str(config),
        "--out",
        str(tmp_path / "run"),
        "--resume",
    ]
    (tmp_path / "notes").mkdir()
    environment = {k: v for k, v in rank_environment(0, 1, 0).items() if k not in RANKS}
    environment |= {"TMPDIR": str(tmp_path / "notes"), "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(launched, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "no-such-set" in done.stderr
    for start in (1, 2, 3):
        assert f"(restart {start} of 3 stopped: a restart cannot fix this)" in done.stderr
    # The agent imports PyTorch once, and each of the two ranks at most once.
    assert 1 <= len(re.findall(r"\| +torch\n", done.stderr)) <= 3
