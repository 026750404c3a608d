"""Failures injected under torchrun's agent: every rank reports them, ranks restart, and the result is the same."""

from __future__ import annotations

import errno
import importlib.util
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from comtip_shards import ShardSet

from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.async_writer import Writer, copied
from comtip_fast.training.checkpoint.store import Checkpoint
from comtip_fast.training.distributed.failures import RestartError, disk_trouble, explain_failures
from comtip_fast.training.distributed.signals import hold_run
from comtip_fast.training.protocol import TrainingError
from testkit.elastic import stderr_of
from tests.comtip_fast.trainer_standin import fit

SCRIPT = Path(__file__).parents[2] / "bench" / "train" / "fault_injection.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("fault_injection_bench", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fault_injection_bench"] = module
    spec.loader.exec_module(module)
    return module


bench = load_script()


@pytest.fixture(scope="module")
def config(tiny_shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench.write_config(tiny_shards.path, tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outcome = bench.run(config, tmp_path_factory.mktemp("reference") / "w")
    assert outcome.code == 0
    return outcome.folder / "run"


@pytest.fixture(scope="module")
def named(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bench.run(config, tmp_path_factory.mktemp("named") / "n", bench.NAMED)


def test_five_seeded_kills_leave_the_same_run(config: Path, reference: Path, tmp_path: Path):
    outcome = bench.run(config, tmp_path / "killed", bench.random_kills(5, seed=3))
    assert outcome.code == 0
    assert len(outcome.rows) >= 3, "hardly killed at all"
    assert all(math.isfinite(r["seconds"]) for r in outcome.rows[:-1])
    assert bench.differences(outcome.folder / "run", reference) == []


def test_every_other_failure_leaves_the_same_run(named: Any, reference: Path):
    assert [r["kind"] for r in named.rows] == [b.kind for b in bench.NAMED]
    assert named.code == 0
    assert bench.differences(named.folder / "run", reference) == []
    damaged = sorted(p.name for p in (named.folder / "run/checkpoints").glob("damaged_*"))
    assert len(damaged) >= 1


@pytest.mark.slow
def test_a_lost_node_is_replaced_and_leaves_the_same_run(config: Path, reference: Path, tmp_path: Path):
    outcome = bench.replace_node(config, tmp_path / "node")
    assert outcome.code == 0
    assert bench.differences(outcome.folder / "run", reference) == []


@pytest.mark.slow
def test_a_run_continues_with_fewer_nodes_and_then_with_more(config: Path, reference: Path, tmp_path: Path):
    outcome = bench.shrink_and_grow(config, tmp_path / "sized")
    assert outcome.code == 0
    assert bench.largest_difference(outcome.folder / "run", reference) < bench.RESIZED_TOLERANCE


@pytest.mark.parametrize(
    ("attempt", "rank", "message"),
    [
        (0, 0, "stopped at step 3 by a signal"),
        (1, 0, "no space is left"),
        (1, 1, "rank 0: .*no space is left"),
        (2, 1, "during step 13: the connection to another rank is lost"),
        (3, 0, "skipped a damaged checkpoint"),
        (4, 1, "step 15 has taken more than watch.stall_stop_s=8 s"),
        (5, 0, "during step 18: a rank did not reach a collective within engine.timeout_s=10 s"),
    ],
)
def test_every_rank_reports_what_happened(named: Any, attempt: int, rank: int, message: str):
    import re

    assert re.search(message, stderr_of(named.folder, attempt, rank)), stderr_of(named.folder, attempt, rank)[-2000:]


# -- unit tests ------------------------------------------------------------------------------------------------


def some() -> Checkpoint:
    return Checkpoint({"a": torch.ones(300)}, {"a/step": torch.ones(())}, {"step": 1})


@pytest.mark.parametrize(
    "broken",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Exception):
    checkpoints.save(tmp_path, 1, some())
    plain = checkpoints.save_file

    def full(tensors: Any, path: Path) -> None:
        plain(tensors, path)
        raise broken

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(
        RestartError, match=r"step_00000002: .*no space is left.* the checkpoint of step 1 is unchanged"
    ):
        checkpoints.save(tmp_path, 2, some())
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    checkpoints.load(tmp_path / "step_00000001")


def test_a_file_size_limit_is_reported_too(tmp_path: Path):
    import subprocess

    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from comtip_fast.training.checkpoint.store import Checkpoint, save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "save(Path(sys.argv[1]), 2, Checkpoint({'a': torch.ones(30000)}, {}, {}))\n"
    )
    import os

    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=env, capture_output=True, text=True, check=False)
    assert "RestartError" in done.stderr.splitlines()[-1], done.stderr
    assert "exceeds the maximum file size" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_only_errors_that_a_restart_can_fix_are_converted():
    assert disk_trouble(OSError(errno.ENOENT, "no such file")) is None
    for error, size in ((ValueError("x"), 2), (RuntimeError("shape mismatch"), 2), (RuntimeError("gloo"), 1)):
        with pytest.raises(type(error)) as caught, explain_failures(0, size, lambda: "step 1", 1.0):
            raise error
        assert caught.value is error
    with (
        pytest.raises(RestartError, match=r"rank 1 of 2, step 1: the connection"),
        explain_failures(1, 2, lambda: "step 1", 1.0),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")


def test_a_restarted_rank_waits_for_the_folder(tmp_path: Path):
    import threading

    with hold_run(tmp_path), pytest.raises(TrainingError, match="in use"), hold_run(tmp_path, 0.2):
        pass
    held = hold_run(tmp_path)
    held.__enter__()
    threading.Timer(0.5, lambda: held.__exit__(None, None, None)).start()
    began = time.monotonic()
    with hold_run(tmp_path, 20):
        assert time.monotonic() - began >= 0.3


# -- asynchronous checkpoints ---------------------------------------------------------------------------


def test_at_most_one_write_is_in_flight_and_its_error_is_raised_once():
    writer, order = Writer(), []

    def slow() -> None:
        time.sleep(0.2)
        order.append("first")

    def bad() -> None:
        order.append("second")
        raise RestartError("no space is left")

    writer.submit(slow)
    assert order == [], "the caller must not wait"
    writer.submit(bad)
    assert order[0] == "first", "at most one at a time"
    with pytest.raises(RestartError, match="no space"):
        writer.drain()
    writer.drain()
    assert not writer.failed


def test_a_copy_is_not_changed_by_the_next_step():
    original = some()
    taken = copied(original)
    original.model["a"].mul_(0)
    original.optim["a/step"].add_(1)
    assert float(taken.model["a"].sum()) == 300
    assert float(taken.optim["a/step"]) == 1


def test_asynchronous_and_synchronous_checkpoints_give_the_same_run(tmp_path: Path):
    for name in ("true", "false"):
        fit(tmp_path / name, f"train.async_checkpoint={name}", "train.checkpoint_every=1", "train.keep_checkpoints=99")
    one, other = (sorted((tmp_path / n / "checkpoints").rglob("*.safetensors")) for n in ("true", "false"))
    assert len(one) == len(other) >= 34
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True))


def test_an_error_of_the_thread_ends_the_run_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(root: Path, step: int, checkpoint: Checkpoint) -> Path:
        raise RestartError(f"step {step}: no space is left")

    monkeypatch.setattr(checkpoints, "save", full)
    seen: list[int] = []

    def slow(step: int) -> None:
        seen.append(step)
        time.sleep(0.02)

    with pytest.raises(RestartError, match="step 3: no space"):
        fit(tmp_path / "run", at_step=slow)
    assert seen[-1] <= 6
    assert not (tmp_path / "run/export").exists()
