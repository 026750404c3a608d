"""Several ranks give the losses and gradients of one process (all cases: bench/train/parity.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comtip_shards import ShardSet

from comtip_fast.collectives import SingleProcessGroup, counts_of, share_of
from comtip_fast.config.io import ConfigError, load_config
from comtip_fast.training.checkpoint import store as checkpoint
from comtip_fast.training.distributed import process_group
from comtip_fast.training.distributed.process_group import (
    DistributedEnv,
    TrainingError,
    distributed_env,
    first_host,
    gpu_of,
    init_distributed,
)
from comtip_fast.training.export_checkpoint import export_checkpoint
from testkit import tiny
from testkit.distributed import RankError, run_distributed

ROOT = Path(__file__).parents[2]


def load_script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


parity = load_script(ROOT / "bench" / "train" / "parity.py")
curves = load_script(ROOT / "bench" / "train" / "curves.py")
traffic = load_script(ROOT / "bench" / "train" / "traffic.py")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_gradients_are_those_of_one_process(world: int, tiny_shards: ShardSet):
    rows = parity.run(str(tiny_shards.path), [world], quick=True)
    assert len(rows) == len(parity.cases(quick=True, world=world))
    for row in rows:
        assert row["ok"], row


def test_the_traffic_of_the_contrastive_loss_is_that_of_its_formula():
    rows = traffic.run([2], 16, 256)
    assert {(row["form"], row["columns"]) for row in rows} == {(f, n) for f in ("gather", "ring") for n in (16, 32)}
    for row in rows:
        assert row["bytes"] == pytest.approx(row["formula"], rel=0.02), row
        assert row["share"] <= traffic.LIMIT[row["form"]], row


def test_shares_are_contiguous_and_leave_nothing_out():
    for n in (0, 1, 5, 12, 13):
        for size in (1, 2, 4, 7):
            rows = [i for rank in range(size) for i in range(n)[share_of(n, rank, size)]]
            assert rows == list(range(n))
            assert max(counts_of(n, size)) - min(counts_of(n, size)) <= 1


def test_the_launcher_is_found_in_the_environment():
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1234"}
    with pytest.raises(TrainingError, match="environment: RANK='x' is not an integer; start with torchrun"):
        distributed_env(torchrun | {"RANK": "x"})
    env = distributed_env(torchrun)
    assert (env.rank, env.size, env.local_rank, env.address, env.port) == (3, 4, 1, "a", 1234)
    slurm = {
        "SLURM_PROCID": "9",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "70123",
        "SLURM_STEP_NODELIST": "gpu[03-04,11]",
        "SLURM_NTASKS": "16",
    }
    env = distributed_env(slurm)
    assert (env.rank, env.size, env.local_rank, env.address) == (9, 16, 1, "gpu03")
    assert distributed_env(slurm | {"SLURM_STEP_NODELIST": "b1,b2"}).address == "b1"
    # salloc starts one process, independent of the size of the allocation.
    assert distributed_env({"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}).size == 1
    assert distributed_env({}).size == 1
    with pytest.raises(TrainingError, match="MASTER_ADDR"):
        distributed_env({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(TrainingError, match="MASTER_ADDR"):
        first_host("")


def test_each_process_uses_its_gpu_and_the_only_one_it_sees(monkeypatch: pytest.MonkeyPatch):
    env = DistributedEnv(rank=11, size=16, local_rank=3, launcher="slurm")
    assert gpu_of(env, 8) == 3
    assert gpu_of(env, 4) == 3
    assert gpu_of(env, 1) == 0  # srun --gpus-per-task=1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(
        TrainingError, match=r"^rank 11: process 3 of its host .* sees 2 GPUs .*=0,1\); start one process"
    ):
        gpu_of(env, 2)


def test_the_gpu_of_a_process_is_selected_before_its_group_is_made(monkeypatch: pytest.MonkeyPatch):
    """Also for DeepSpeed, which selects the GPU whose number LOCAL_RANK is."""
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # restored afterwards
        monkeypatch.setenv(name, "")

    def stop(backend: str, **_: object) -> None:
        done.append((backend, os.environ["LOCAL_RANK"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(dist, "init_process_group", stop)
    monkeypatch.setattr(process_group, "_store", lambda *_: None)
    with pytest.raises(KeyboardInterrupt), init_distributed(env=DistributedEnv(3, 4, 3, "a", 1, "slurm")):
        pass
    assert done == [0, ("nccl", "0")]


def test_a_numbered_gpu_is_the_current_one_of_one_process_and_refused_for_several(monkeypatch: pytest.MonkeyPatch):
    """Events and streams are those of the current GPU; all ranks would share the GPU of this number."""
    current: list[str] = []

    @contextmanager
    def use(device: str) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", use)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with init_distributed(device="cuda:1", env=DistributedEnv()) as group:
        assert (group.size, current) == (1, ["cuda:1"])
        assert os.environ["LOCAL_RANK"] == "1"  # to this GPU, DeepSpeed moves the model
    with init_distributed(device="cuda", env=DistributedEnv()):
        assert not current
    with (
        pytest.raises(TrainingError, match=r"^train.device=cuda:1: 4 processes .* set train.device=cuda, so that"),
        init_distributed(device="cuda:1", env=DistributedEnv(3, 4, 3, "a", 1, "slurm")),
    ):
        pass


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["engine.offload_optimizer=cpu"], "deepspeed"),
        (["engine.kind=deepspeed", "engine.offload_param=cpu"], "zero_stage=3"),
        (["engine.kind=deepspeed", "engine.zero_stage=3", "engine.offload_param=nvme"], "nvme_path"),
        (["engine.micro_batches=0"], r"engine\.micro_batches: .* greater than or equal to 1"),
    ],
)
def test_engine_settings_that_do_not_fit_are_refused(bad: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(None, bad)


def test_deepspeeds_config_is_derived_from_ours():
    from comtip_fast.training.engines.deepspeed import deepspeed_config

    config = load_config(
        None,
        [
            "engine.kind=deepspeed",
            "engine.zero_stage=3",
            "engine.offload_optimizer=nvme",
            "engine.offload_param=cpu",
            "engine.nvme_path=scratch",
            "engine.bucket_mb=4",
            "optim.clip=0.5",
            "data.batch_size=64",
        ],
    )
    derived = deepspeed_config(config, 4, gpu=True)
    zero = derived["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"]) == (3, 2**20)
    assert zero["offload_optimizer"] == {"device": "nvme", "pin_memory": True, "nvme_path": "scratch"}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert derived["gradient_clipping"] == 0.5
    assert derived["train_micro_batch_size_per_gpu"] == 16
    json.dumps(derived)


@pytest.mark.parametrize("fork", [False, True])
def test_a_failing_rank_ends_the_others_and_is_named(tmp_path: Path, fork: bool):
    script = tmp_path / "s.py"
    script.write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1':\n    print('no such thing'); sys.exit(3)\ntime.sleep(60)\n"
    )
    with pytest.raises(RankError, match=r"rank 1 of 2 exited with code 3:\nno such thing"):
        run_distributed([str(script)], 2, timeout_s=50, fork=fork)


def test_a_forked_rank_runs_a_script_as_python_does(tmp_path: Path):
    script = tmp_path / "s.py"
    script.write_text(
        "import atexit, os, sys\nimport nearby\natexit.register(print, 'at exit', os.environ['RANK'])\n"
        "print(__name__, sys.argv[1:], nearby.VALUE, os.environ['OMP_NUM_THREADS'], 'deepspeed' in sys.modules)\n"
    )
    (tmp_path / "nearby.py").write_text("VALUE = 7\n")
    outputs = run_distributed([str(script), "a"], 2, timeout_s=50, fork=True)
    assert outputs == [f"__main__ ['a'] 7 1 True\nat exit {rank}\n" for rank in range(2)]
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(RankError, match="exited with code -9"):
        run_distributed([str(script)], 1, timeout_s=50, fork=True)
    script.write_text("raise ValueError('no such thing')\n")
    with pytest.raises(RankError, match=r"exited with code 1:\n(.*\n)+ValueError: no such thing"):
        run_distributed([str(script)], 1, timeout_s=50, fork=True)


@pytest.mark.slow
def test_runs_give_the_curve_of_one_process_and_resume_with_another_engine(tiny_shards: ShardSet, tmp_path: Path):
    """With the trainer: SIGTERM to one rank stops all at the same step; checkpoints are independent of engine and world size."""
    rows = curves.run(str(tiny_shards.path), tmp_path, 12, [2], "quick")
    assert [row["run"] for row in rows] == curves.QUICK
    for row in rows:
        assert row["ok"], row
    for run in curves.QUICK:
        folder = tmp_path / "2" / run.name
        assert (folder / "export" / "model.safetensors").is_file()
        written = json.loads((checkpoint.folder_of(folder / "checkpoints", 12) / "state.json").read_text())
        assert written["world_size"] == 2
    # A checkpoint of ZeRO 3 has one file per rank, and is exported as any other.
    parts = tmp_path / "2" / curves.QUICK[1].name
    assert checkpoint.is_in_parts(checkpoint.folder_of(parts / "checkpoints", 12))
    assert export_checkpoint(parts, "newest", tmp_path / "newest", str(tiny_shards.path)) == 12
    exports = [(folder / "model.safetensors").read_bytes() for folder in (parts / "export", tmp_path / "newest")]
    assert exports[0] == exports[1]
    # One process resumes the run of two ZeRO ranks, which resumed that of two ranks of another engine.
    other = tmp_path / "2" / curves.QUICK[-1].name
    checkpoint.delete(checkpoint.folder_of(other / "checkpoints", 12))
    curves.train(str(tiny_shards.path), other, 12, SingleProcessGroup(), settings=curves.engine("single"), resume=True)
    assert curves.deviations(curves.losses(other), curves.losses(tmp_path / "one"))[10] < 1e-5


def test_the_loss_curve_is_the_one_committed(tmp_path: Path):
    """A different curve means that training has changed: state it in the CHANGELOG and rewrite the file (bench/train/curves.py)."""
    shards = tiny.tiny_shards(tmp_path)
    curves.train(str(shards), tmp_path / "run", 50, SingleProcessGroup(), settings=curves.engine("single"))
    golden = json.loads((ROOT / "tests" / "golden" / "loss_curve.json").read_text())["losses"]
    off = curves.deviations(curves.losses(tmp_path / "run"), golden)
    assert off[10] <= 1e-5, off
    assert off[50] <= 1e-3, off
