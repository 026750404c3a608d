"""The training loop: steps, validation, checkpoints, and getting through being killed.

Everything a run will do is a function of its config, its data and a few integers (step, epoch, place in the
epoch), so a run killed at any moment and resumed gives the same losses and weights as one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comtip_fast.config.io import config_to_dict, dump_config, flatten
from comtip_fast.config.schema import RunConfig
from comtip_fast.training import checkpoint as checkpoints
from comtip_fast.training.checkpoint import Checkpoint, CheckpointError
from comtip_fast.training.loggers import Logger, finite, keep_rows_up_to, make_loggers
from comtip_fast.training.optim import learning_rate, make_optimizer, optimizer_tensors, restore_optimizer
from comtip_fast.training.protocol import TrainingError, TrainingTask
from comtip_fast.training.signals import Signals, catch_signals, hold_run

log = logging.getLogger("comtip_fast")

NONFINITE = "nonfinite.jsonl"
CHECKPOINTS = "checkpoints"
# Keys that may differ when a run is resumed: they change neither weights nor the loss trace. The place of the
# shards may change too, because their hash is compared; and what to do about a NaN, because it stopped the run.
FREE_KEYS = {
    "name", "data.shards", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.tensorboard",
    "train.wandb", "train.nan_policy", "train.max_skips",
}  # fmt: skip


@dataclass
class RunState:
    """Where a run is: all of its state besides weights and moments."""

    step: int = 0
    epoch: int = 0
    position: int = 0
    """Batches of this epoch already used."""
    best_step: int = 0
    best_score: float = float("-inf")
    bad_validations: int = 0
    skips: int = 0
    stopped: str = ""
    """``steps`` or ``patience`` once training is over."""


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    step: int
    best_step: int
    best_score: float
    stopped: str
    """``steps``, ``patience`` or ``sigterm``."""


class Trainer:
    """Runs a task to its end, or to the next signal."""

    def __init__(self, task: TrainingTask, config: RunConfig, run_dir: Path | str) -> None:
        self.task, self.config, self.run_dir = task, config, Path(run_dir)
        self.checkpoint_dir = self.run_dir / CHECKPOINTS
        self.optimizer = make_optimizer(task.module, config.optim)
        self.progress = RunState()
        self.device = next(task.module.parameters()).device
        self._epoch_batches: tuple[int, list[np.ndarray]] = (-1, [])
        self._loggers: list[Logger] = []
        self._saved_step = -1
        self._busy_s, self._busy_spots = 0.0, 0

    def fit(self, resume: bool = False) -> FitResult:
        """Train; with ``resume`` go on from the newest good checkpoint, or start where there is none.

        Raises
        ------
        TrainingError
            The folder is in use or holds another run, the config or data changed, or a loss is not finite.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with hold_run(self.run_dir), _deterministic(self.device), catch_signals() as caught:
            resumed = self._start(resume)
            if not self.progress.stopped:
                self.task.prepare()
            resolved = config_to_dict(self.config)
            self._loggers = make_loggers(self.config, resolved, self.run_dir, start=self.progress.step, resumed=resumed)
            try:
                self._loop(caught)
            finally:
                for logger in self._loggers:
                    logger.close()
        p = self.progress
        return FitResult(p.step, p.best_step, p.best_score, p.stopped or "sigterm")

    # -- start ------------------------------------------------------------------------------------------

    def _start(self, resume: bool) -> bool:
        checkpoints.clear_leftovers(self.checkpoint_dir)
        steps = checkpoints.steps_of(self.checkpoint_dir)
        refuse_second_run(self.run_dir, resume)
        found = checkpoints.newest_good(self.checkpoint_dir)
        if found is None:
            if steps:
                raise TrainingError(f"{self.checkpoint_dir}: no checkpoint is whole; delete the folder to start again")
            if resume:
                log.info("%s holds no checkpoint yet: starting at step 0", self.run_dir)
            (self.run_dir / NONFINITE).unlink(missing_ok=True)
            self._write_config()
            return False
        step, loaded = found
        self._check_same_run(loaded.state)
        checkpoints.set_aside_after(self.checkpoint_dir, step)
        self._restore(loaded)
        self._prune()  # the run may have been killed just before it would have
        self._write_config()
        keep_rows_up_to(self.run_dir / NONFINITE, step)
        log.info("resumed from step %d", step)
        return True

    def _write_config(self) -> None:
        aside = self.run_dir / ".config.yaml.writing"
        aside.write_text(dump_config(self.config), encoding="utf-8")
        aside.replace(self.run_dir / "config.yaml")

    def _check_same_run(self, state: dict[str, Any]) -> None:
        old, new = flatten(state["config"]), flatten(config_to_dict(self.config))
        changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in FREE_KEYS]
        if changed:
            shown = ", ".join(f"{k} ({old.get(k)} -> {new.get(k)})" for k in changed[:5])
            raise TrainingError(
                f"{self.run_dir}: cannot resume with another config: {shown}; set them back or give another --out"
            )
        found = self.task.fingerprint()
        if state["fingerprint"] != found:
            other = [k for k in found if state["fingerprint"].get(k) != found[k]]
            raise TrainingError(f"{self.run_dir}: cannot resume, what it read has changed: {', '.join(other)}")
        for what, now in (("device", self.device.type), ("torch", torch.__version__)):
            if state.get(what, now) != now:
                log.warning("%s: was %s, is %s; the same up to rounding, but not to the bit", what, state[what], now)

    # -- the loop ---------------------------------------------------------------------------------------

    def _loop(self, caught: Signals) -> None:
        p, cfg = self.progress, self.config.train
        if p.stopped:
            log.info("this run is finished (%s); writing its export again", p.stopped)
        while not p.stopped:
            if caught.received:
                if self._saved_step != p.step:
                    self._save()
                return
            self._one_step()
            if p.step >= cfg.steps:
                p.stopped = "steps"
            if cfg.validate_every and (p.step % cfg.validate_every == 0 or p.stopped):
                self._validate()
            if p.step % cfg.checkpoint_every == 0 or p.best_step == p.step or p.stopped:
                self._save()
        self._export_best()

    def _one_step(self) -> None:
        p = self.progress
        began = time.monotonic()
        spots = self._next_batch()
        step = p.step + 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config.train.steps, self.config.optim)
        self.task.module.train()
        with self._autocast():
            losses, numbers = self.task.losses(self.task.batch(spots, step, p.epoch))
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = self._clip()
        if math.isfinite(float(losses["loss"].detach())) and math.isfinite(norm):
            self.optimizer.step()
            self.task.after_step(step)
        else:
            self._not_finite(step, spots, losses)
        p.step, p.position = step, p.position + 1
        self._busy_s, self._busy_spots = self._busy_s + time.monotonic() - began, self._busy_spots + len(spots)
        if step % self.config.train.log_every == 0 or step == 1:
            row = {"step": step, "kind": "train", "epoch": p.epoch}
            row |= {k: float(v.detach()) for k, v in losses.items()} | numbers
            row |= {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm, "skips": p.skips}
            row["spots_per_s"] = self._busy_spots / max(self._busy_s, 1e-9)
            self._busy_s, self._busy_spots = 0.0, 0
            self._log(row)

    def _next_batch(self) -> np.ndarray:
        p = self.progress
        while True:
            if self._epoch_batches[0] != p.epoch:
                self._epoch_batches = (p.epoch, self.task.batches(p.epoch))
            batches = self._epoch_batches[1]
            if not batches:
                raise TrainingError("the task gives no batches: there are no training spots")
            if p.position < len(batches):
                return batches[p.position]
            p.epoch, p.position = p.epoch + 1, 0

    def _clip(self) -> float:
        """Clip the gradients to ``optim.clip`` and return their norm; gradients that are not finite stay as they are.

        (Scaling by a norm of NaN would make every gradient NaN and hide the first one.)
        """
        trained = [q for q in self.task.module.parameters() if q.grad is not None]
        norm = torch.nn.utils.get_total_norm([q.grad for q in trained if q.grad is not None])
        if self.config.optim.clip and math.isfinite(float(norm)):
            torch.nn.utils.clip_grads_with_norm_(trained, self.config.optim.clip, norm)
        return float(norm)

    def _autocast(self) -> AbstractContextManager[Any]:
        wanted = self.config.train.precision
        if wanted == "bf16" or (wanted == "auto" and self.device.type == "cuda"):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _not_finite(self, step: int, spots: np.ndarray, losses: dict[str, Tensor]) -> None:
        """Say what happened where; stop, or skip the update and count it."""
        cfg, path = self.config.train, self.run_dir / NONFINITE
        parts = {k: float(v.detach()) for k, v in losses.items()}
        bad = [k for k, v in parts.items() if not math.isfinite(v)]
        named = self.task.module.named_parameters()
        gradients = [n for n, q in named if q.grad is not None and not bool(q.grad.isfinite().all())]
        record = {"step": step, "epoch": self.progress.epoch, "position": self.progress.position, "parts": parts,
                  "gradients": gradients, "spot_index": spots.tolist()}  # fmt: skip
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")
        what = f"loss part {', '.join(k for k in bad if k != 'loss') or 'loss'}" if bad else "the gradient"
        first = f" (gradients of {len(gradients)} parameters, first {gradients[0]})" if gradients else ""
        some = ", ".join(str(i) for i in spots[:5].tolist())
        text = f"step {step}: {what} is not finite{first}; spots {some} ...; the whole batch is in {path}"
        if cfg.nan_policy == "stop":
            raise TrainingError(
                f"{text}. Start again with a lower optim.lr, or go on with --resume --set train.nan_policy=skip"
            )
        self.progress.skips += 1
        log.warning("%s; update skipped (%d so far)", text, self.progress.skips)
        if self.progress.skips > cfg.max_skips:
            raise TrainingError(f"{text}; more than train.max_skips={cfg.max_skips} updates were skipped")

    def _validate(self) -> None:
        p, cfg = self.progress, self.config.train
        self.task.module.eval()
        score, per_task = self.task.validate()
        better = math.isfinite(score) and score > p.best_score
        if better:
            p.best_score, p.best_step, p.bad_validations = score, p.step, 0
        elif math.isfinite(score):
            p.bad_validations += 1
        else:
            # Patience is about scores that get no better; here there is no score to compare.
            log.warning("step %d: validation gave no score (no section of split val, or no gene to score?)", p.step)
        self._log({"step": p.step, "kind": "valid", "score": score, "per_task": per_task, "best": better})
        if cfg.patience and p.bad_validations >= cfg.patience and not p.stopped:
            p.stopped = "patience"

    def _log(self, row: dict[str, Any]) -> None:
        for logger in self._loggers:
            logger.log(row)

    # -- state ------------------------------------------------------------------------------------------

    def _save(self) -> None:
        p = self.progress
        state = asdict(p) | {"best_score": p.best_score if math.isfinite(p.best_score) else None}
        state |= {"config": config_to_dict(self.config), "fingerprint": self.task.fingerprint()}
        state |= {"device": self.device.type, "torch": torch.__version__, "torch_rng": _hex(torch.get_rng_state())}
        if self.device.type == "cuda":
            state["cuda_rng"] = _hex(torch.cuda.get_rng_state(self.device))
        module = self.task.module
        checkpoints.save(
            self.checkpoint_dir, p.step,
            Checkpoint(module.state_dict(), optimizer_tensors(module, self.optimizer), state),
        )  # fmt: skip
        self._saved_step = p.step
        self._prune()

    def _prune(self) -> None:
        best = self.progress.best_step or None
        checkpoints.prune(self.checkpoint_dir, self.config.train.keep_checkpoints, best)

    def _restore(self, loaded: Checkpoint) -> None:
        self.task.module.load_state_dict(loaded.model)
        restore_optimizer(self.task.module, self.optimizer, loaded.optim)
        state = loaded.state
        fields = {k: state[k] for k in asdict(self.progress)}
        fields["best_score"] = float("-inf") if state["best_score"] is None else state["best_score"]
        self.progress = RunState(**fields)
        torch.set_rng_state(_unhex(state["torch_rng"]))
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(_unhex(state["cuda_rng"]), self.device)
        self._saved_step = self.progress.step
        self._check_best()

    def _check_best(self) -> None:
        """Forget a best checkpoint that is damaged or gone, aloud: the next validation sets a new one."""
        p = self.progress
        if p.best_step in (0, p.step):
            return
        try:
            checkpoints.verify(checkpoints.folder_of(self.checkpoint_dir, p.best_step))
        except CheckpointError as error:
            log.warning("the best checkpoint (step %d, score %.4f) is lost: %s", p.best_step, p.best_score, error)
            p.best_step, p.best_score = 0, float("-inf")

    def _export_best(self) -> None:
        """Export the best weights (the last ones where nothing was validated), whole or not at all."""
        self._check_best()
        step = self.progress.best_step
        if step and step != self.progress.step:
            best = checkpoints.load(checkpoints.folder_of(self.checkpoint_dir, step))
            self.task.module.load_state_dict(best.model)
        self.task.module.eval()
        aside, final = self.run_dir / ".export-writing", self.run_dir / "export"
        shutil.rmtree(aside, ignore_errors=True)
        self.task.export(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)


def _hex(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytes.fromhex(text), np.uint8).copy())


def refuse_second_run(run_dir: Path, resume: bool) -> None:
    """Refuse to begin where a run is already; asked before anything slow is done."""
    steps = checkpoints.steps_of(run_dir / CHECKPOINTS)
    if steps and not resume:
        raise TrainingError(
            f"{run_dir} already holds a run (step {steps[-1]}); go on with --resume, or give another --out"
        )


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms on the CPU; on a GPU they cost speed and are the user's choice."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(device.type == "cpu" or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
