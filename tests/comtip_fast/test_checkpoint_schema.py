"""A checkpoint whose hashes are right is not trusted: its state and its tensors must be such as a run writes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from comtip_fast.training.checkpoint import store as checkpoints
from tests.comtip_fast.trainer_standin import fit

STEP = 8
Forge = Callable[[Path], object]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    fit(folder, at_step=lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == STEP else None)
    return folder


def state(**values: Any) -> Forge:
    """Set keys of the state; ``...`` deletes one."""

    def forge(folder: Path) -> None:
        path = folder / "state.json"
        data = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))

    return forge


def text(name: str, content: bytes) -> Forge:
    return lambda folder: (folder / name).write_bytes(content)


def tensors(name: str, change: Callable[[dict[str, torch.Tensor], str], object]) -> Forge:
    """Change the tensors of a file; ``change`` gets them and the name of the largest."""

    def forge(folder: Path) -> None:
        found = load_file(folder / name)
        change(found, max(found, key=lambda k: found[k].numel()))
        save_file(found, folder / name)

    return forge


def not_finite(found: dict[str, torch.Tensor], name: str) -> None:
    found[name].view(-1)[0] = float("nan")


MODEL, OPTIM = "model.safetensors", "optim.safetensors"
FORGED: dict[str, tuple[Forge, str]] = {
    "a state that is not JSON": (text("state.json", b"{"), "not JSON"),
    "a state nested without end": (text("state.json", b"[" * 100_000), "not JSON"),
    "a state that is a list": (text("state.json", b"[]"), "not the state of a run"),
    "no step": (state(step=...), "step: Field required"),
    "a step of text": (state(step="8"), "step: Input should be a valid integer"),
    "a negative step": (state(step=-1), "step: Input should be greater"),
    "another step": (state(step=9), "do not fit the folder of step 8"),
    "a step without end": (state(step=10**30), "step: "),
    "a best step to come": (state(best_step=10**9), "do not fit the folder of step 8"),
    "a validation to come": (state(validated=9), "do not fit the folder of step 8"),
    "an extension to come": (
        state(extensions=[{"step": 9, "epoch": 1, "sets": ["0" * 64]}]),
        "do not fit the folder of step 8",
    ),
    "an extension without sets": (state(extensions=[{"step": 1, "epoch": 1, "sets": []}]), "extensions.0.sets: "),
    "a score of text": (state(best_score="x"), "best_score: "),
    "a position before the epoch": (state(position=-1), "position: "),
    "no epoch": (state(epoch=...), "epoch: Field required"),
    "skips without end": (state(skips=1e300), "skips: "),
    "stopped by nothing known": (state(stopped="why"), "stopped: "),
    "no config": (state(config=...), "config: Field required"),
    "a config that is a list": (state(config=[]), "config: "),
    "a fingerprint that is a list": (state(fingerprint=[]), "fingerprint: "),
    "a fingerprint of numbers": (state(fingerprint={"a": 1}), r"fingerprint\.a: "),
    "no ranks": (state(world_size=0), "world_size: "),
    "no random state": (state(torch_rng=...), "torch_rng: Field required"),
    "a random state of text": (state(torch_rng="zz"), "torch_rng: "),
    "a short random state": (state(torch_rng="00"), "torch_rng is not a random state"),
    "weights that are text": (text(MODEL, b"weights"), "not safetensors"),
    "weights that are empty": (text(MODEL, b""), "not safetensors"),
    "moments that are text": (text(OPTIM, bytes(100)), "not safetensors"),
    "a weight less": (tensors(MODEL, lambda t, k: t.pop(k)), "weights do not fit the model"),
    "a weight more": (tensors(MODEL, lambda t, k: t.update(x=torch.ones(1))), "weights do not fit the model"),
    "a weight of another shape": (tensors(MODEL, lambda t, k: t.update({k: torch.ones(3)})), "weights do not fit"),
    "a weight that is not finite": (tensors(MODEL, not_finite), "holds values that are not finite"),
    "a moment that is not finite": (tensors(OPTIM, not_finite), "holds values that are not finite"),
    "a moment of another shape": (
        tensors(OPTIM, lambda t, k: t.update({k: torch.ones(3)})),
        "does not fit a parameter",
    ),
    "moments of nothing": (
        tensors(OPTIM, lambda t, k: t.update({"x/step": torch.ones(())})),
        "does not fit a parameter",
    ),
    "moments without a name": (tensors(OPTIM, lambda t, k: t.update(x=torch.ones(()))), "does not fit a parameter"),
    "a moment less": (tensors(OPTIM, lambda t, k: t.pop(k)), "is incomplete"),
}


def resume(run: Path, folder: Path) -> None:
    checkpoints.load(folder)  # what cannot be parsed; the run itself then falls back to an older checkpoint
    fit(run, resume=True)


@pytest.mark.parametrize("name", FORGED)
def test_a_checkpoint_with_right_hashes_is_refused_by_file_and_field(stopped: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    folder = checkpoints.folder_of(run / "checkpoints", STEP)
    for other in (run / "checkpoints").iterdir():
        if other != folder:
            shutil.rmtree(other)
    forge, message = FORGED[name]
    forge(folder)
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in checkpoints.FILES]
    (folder / "SHA256SUMS").write_text("".join(lines))
    with pytest.raises(checkpoints.CheckpointError, match=rf"step_00000008.*{message}") as caught:
        resume(run, folder)
    assert "delete the folder to use an older checkpoint" in str(caught.value)


def test_the_same_checkpoint_unchanged_resumes(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    assert fit(tmp_path / "run", resume=True).stopped == "steps"
