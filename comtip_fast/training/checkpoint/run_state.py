"""What a run's checkpoint says of it besides weights and moments, and whether another start may go on from that."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comtip_fast.config.io import config_from_dict, config_to_dict, flatten
from comtip_fast.config.schema import EngineConfig, RunConfig, WatchConfig
from comtip_fast.training.protocol import TrainingError

log = logging.getLogger("comtip_fast")
# Keys that may differ when a run is resumed: they change neither weights nor the loss trace. The place of the
# shards may change too, because their hash is compared; and what to do about a NaN, because it stopped the run. How the
# step is spread over ranks changes it by rounding only, so a run may go on with another engine or number of ranks.
FREE_KEYS = {
    "name",
    "data.shards",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.tensorboard",
    "train.wandb",
    "train.nan_policy",
    "train.max_skips",
    "train.async_checkpoint",
    # Which loader reads changes tiles by no more than JPEG decoders differ; the others change no batch at all.
    "data.loader",
    "data.workers",
    "data.prefetch",
    "data.expression",
    "data.max_faults",
    *(f"engine.{f.name}" for f in fields(EngineConfig)),
    *(f"watch.{f.name}" for f in fields(WatchConfig)),
}


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

    def as_plain(self) -> dict[str, Any]:
        """Return it as JSON has it, which knows no infinity."""
        return asdict(self) | {"best_score": self.best_score if math.isfinite(self.best_score) else None}

    @classmethod
    def from_plain(cls, state: dict[str, Any]) -> RunState:
        """Undo :meth:`as_plain`; further keys are passed over."""
        own = {f.name: state[f.name] for f in fields(cls)}
        return cls(**own | {"best_score": float("-inf") if own["best_score"] is None else own["best_score"]})


def check_same_run(
    run_dir: Path,
    state: dict[str, Any],
    config: RunConfig,
    fingerprint: dict[str, str],
    size: int,
    device: torch.device,
) -> None:
    """Refuse to go on from a checkpoint's ``state`` with another config or other data; warn where rounding may differ.

    Parameters
    ----------
    run_dir
        For messages.
    state
        Of the checkpoint.
    config, fingerprint, size, device
        Of the run that would go on: its config, hashes of what it reads, W, and where it computes.

    Raises
    ------
    TrainingError
        A key outside :data:`FREE_KEYS`, or what the run reads, has changed.
    """
    # Through the reader: keys that are new since then are at their defaults, renamed ones under their new names.
    then = config_from_dict(state["config"], f"the checkpoint in {run_dir}")
    old, new = flatten(config_to_dict(then)), flatten(config_to_dict(config))
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in FREE_KEYS]
    if changed:
        shown = ", ".join(f"{k} ({old.get(k)} -> {new.get(k)})" for k in changed[:5])
        raise TrainingError(
            f"{run_dir}: cannot resume with another config: {shown}; set them back or give another --out"
        )
    if state["fingerprint"] != fingerprint:
        other = [k for k in fingerprint if state["fingerprint"].get(k) != fingerprint[k]]
        raise TrainingError(f"{run_dir}: cannot resume, what it read has changed: {', '.join(other)}")
    now_run = config.engine.kind, size
    then_run = state["config"].get("engine", {}).get("kind", "auto"), state.get("world_size", 1)
    if now_run != then_run:
        log.warning("was engine %s over %d ranks, is %s over %d; the same up to rounding", *then_run, *now_run)
    for what, now in (("device", device.type), ("torch", torch.__version__)):
        if state.get(what, now) != now:
            log.warning("%s: was %s, is %s; the same up to rounding, but not to the bit", what, state[what], now)


def random_state(device: torch.device) -> dict[str, str]:
    """Return PyTorch's random state as text."""
    out = {"torch_rng": _hex(torch.get_rng_state())}
    if device.type == "cuda":
        out["cuda_rng"] = _hex(torch.cuda.get_rng_state(device))
    return out


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`random_state` gave."""
    torch.set_rng_state(_unhex(state["torch_rng"]))
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(_unhex(state["cuda_rng"]), device)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms on the CPU; on a GPU they cost speed and are the user's choice."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(device.type == "cpu" or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _hex(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytes.fromhex(text), np.uint8).copy())
