"""A minimal task for tests of the trainer; as a script, it trains while being killed repeatedly.

``python trainer_standin.py FOLDER SEED`` trains twice: undisturbed in FOLDER/reference, and in FOLDER/killed with
SIGKILL at random file operations and times, resuming after each. It prints the number of kills.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from comtip_fast.config.io import load_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.training.protocol import ValidationResult
from comtip_fast.training.trainer import FitResult, Trainer

SPOTS, BATCH = 40, 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.register_buffer("teacher", torch.zeros(8, 4))


class StandIn:
    """Implement TrainingTask. Dropout makes it depend on torch's random state, the teacher on after_step."""

    def __init__(self, config: RunConfig, at_step: Callable[[int], None] = lambda step: None) -> None:
        torch.manual_seed(config.train.seed)
        self.module, self.config, self.at_step = Net(), config, at_step
        rng = np.random.default_rng(0)
        self.x = torch.from_numpy(rng.normal(size=(SPOTS, 4)).astype(np.float32))
        self.y = self.x[:, :1] * 2 + torch.sin(self.x[:, 1:2])
        self.nan_steps: dict[int, str] = {}
        self.scores: dict[int, float] = {}
        self.step = 0
        self.data_hash = "abc"

    def fingerprint(self) -> dict[str, str]:
        return {"shards": self.data_hash}

    def prepare(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def metrics(self) -> dict[str, float]:
        return {"faults": 0.0}

    def batches(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([self.config.train.seed, epoch]).permutation(SPOTS)
        return np.split(order, SPOTS // BATCH)

    def batch(self, spot_index: np.ndarray, step: int, epoch: int) -> tuple[Tensor, Tensor]:
        self.at_step(step)
        self.step = step
        return self.x[spot_index], self.y[spot_index]

    def losses(self, module: Net, batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        x, y = batch
        nce, mfm = (self.module.body(x) - y).square().mean(), self.module.body[0].weight.square().mean()
        kind = self.nan_steps.get(self.step)
        if kind == "loss":
            mfm = mfm * float("nan")
        elif kind == "gradient":  # sqrt is finite at 0, its derivative is not
            mfm = mfm + (self.module.body[1].bias * 0).sum().sqrt()
        return {"loss": nce + 0.1 * mfm, "nce": nce, "mfm": mfm}, {"scale": 1.0}

    def after_step(self, module: Net, step: int) -> None:
        self.module.teacher.mul_(0.9).add_(self.module.body[0].weight.detach(), alpha=0.1)

    def is_validated(self, name: str) -> bool:
        return True

    @torch.no_grad()
    def validation_share(self, progress: Callable[[str], None]) -> float:
        assert not self.module.training
        return self.scores.get(self.step, -float((self.module.body(self.x) - self.y).square().mean()))

    def validation_result(self, shares: list[float]) -> ValidationResult:
        return shares[0], {"human_breast": shares[0]}, {}

    def export(self, folder: Path) -> None:
        folder.mkdir()
        save_file({k: v.clone() for k, v in self.module.state_dict().items()}, folder / "model.safetensors")


def config_of(*overrides: str) -> RunConfig:
    base = [
        "train.steps=17",
        "train.checkpoint_every=4",
        "train.validate_every=3",
        "train.log_every=1",
        "train.patience=0",
        "optim.warmup_steps=3",
        "optim.lr=0.05",
        "train.device=cpu",
    ]
    return load_config(None, [*base, *overrides])


def fit(folder: Path, *overrides: str, resume: bool = False, at_step: Callable[[int], None] | None = None) -> FitResult:
    config = config_of(*overrides)
    return Trainer(StandIn(config, at_step or (lambda step: None)), config, folder).fit(resume=resume)


# -- the script ---------------------------------------------------------------------------------------------


def _child(work: Callable[[], object]) -> int:
    """Run ``work`` in a fork and return its exit status: 0, or minus the signal number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _die_at_file_operation(folder: Path, countdown: int) -> None:
    """SIGKILL this process at its n-th open, rename, mkdir or remove inside ``folder``."""
    left = [countdown]

    def hook(event: str, args: tuple[object, ...]) -> None:
        watched = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
        if event in watched and any(str(folder) in str(a) for a in args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _die_at_moment(seconds: float) -> None:
    """Die of an unhandled alarm: as sudden as SIGKILL, and it cannot hit another process."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)  # a fork must not inherit a thread pool
    torch.optim.AdamW(Net().parameters())  # slow import, once instead of in each fork
    assert _child(lambda: fit(folder / "reference", "train.steps=40")) == 0
    rng, kills, killed = random.Random(seed), 0, folder / "killed"
    while True:
        # There are about 30 file operations between two checkpoints: kills hit every part of saving and the steps in between.
        at_moment, operation, moment = kills % 4 == 3, rng.randint(1, 80), rng.uniform(0.001, 0.05)

        def attempt(at_moment: bool = at_moment, operation: int = operation, moment: float = moment) -> None:
            _die_at_moment(moment) if at_moment else _die_at_file_operation(killed, operation)
            fit(killed, "train.steps=40", resume=True)

        end = _child(attempt)
        if end == 0:
            break
        assert end in (-signal.SIGKILL, -signal.SIGALRM), end
        kills += 1
        assert kills < 400, "no progress"
    print(kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
