"""State of a run other than weights and optimizer state, and the check that a run may resume from a checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comtip_fast.config.io import config_from_dict, config_to_dict, flatten
from comtip_fast.config.schema import EngineConfig, ReadoutConfig, RunConfig, TrainConfig, WatchConfig
from comtip_fast.training.checkpoint.set_changes import APPEND, FIRST, SETS, changed_sets, first_sets, further_sets
from comtip_fast.training.protocol import Extension, TrainingError

log = logging.getLogger("comtip_fast")
# The keys after the schedule change weights and losses by rounding at most. The paths of the shard set and of the gene vectors
# may change because their hashes are compared, and the NaN policy because a NaN may have stopped the run.
FREE_KEYS = {
    "name",
    # Schedule: keys that change later steps only, for example a longer run or another learning rate;
    # docs/fault_tolerance.md describes what each of them changes.
    "train.steps",
    "train.validate_every",
    "train.patience",
    "optim.lr",
    "optim.final_lr",
    "optim.warmup_steps",
    "optim.weight_decay",
    "optim.clip",
    "optim.freeze",
    "optim.spike.policy",
    "optim.spike.factor",
    "optim.ema",
    *(f"optim.{part}.{key}" for part in ("vision", "text", "heads") for key in ("lr_scale", "weight_decay")),
    "optim.vision.layer_decay",
    "data.shards",
    # These are compared with the tiles of the shard set, which are part of the fingerprint.
    "data.tile_px",
    "data.tile_um",
    "text.gene_vectors",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.tensorboard",
    "train.wandb",
    "train.nan_policy",
    "train.max_skips",
    "train.async_checkpoint",
    "train.checkpoint",
    # Loaders differ by the rounding of their JPEG decoders, and a stem's features in memory are rounded to half precision; the
    # others of these keys do not change batches.
    "data.loader",
    "data.workers",
    "data.loader_process",
    "data.prefetch",
    "data.fetch",
    "data.fetch_ahead",
    "data.expression",
    "data.stem_features",
    "data.max_faults",
    # Keys that select an implementation; results are equal up to rounding.
    "text.attention",
    "train.threads",
    *(f"engine.{f.name}" for f in fields(EngineConfig)),
    *(f"watch.{f.name}" for f in fields(WatchConfig)),
    # The readout is fitted at export.
    *(f"readout.{f.name}" for f in fields(ReadoutConfig)),
}
"""Keys of the config that may change when a run resumes."""


SCHEDULE_KEYS = {
    key
    for key in FREE_KEYS
    if key.startswith("optim.") or key in ("train.steps", "train.validate_every", "train.patience")
}
"""Keys in :data:`FREE_KEYS` that change the run after the resumed step; a change is logged."""
EARLIER_VALUES = {"genes": {"detected_in": "every"}, "panel": {"balance": "none"}}
"""Values that hold for checkpoints written before these keys existed, by group and key."""
Sets = str | tuple[str, ...]
"""Value of ``data.shards``."""
GENES = "trained genes"
"""Key of the fingerprint that checkpoints of earlier versions lack."""


def with_earlier_values(then: dict[str, Any], config: RunConfig) -> RunConfig:
    """Return ``config`` with :data:`EARLIER_VALUES` for the keys that the checkpoint's config ``then`` does not have."""
    for group, values in EARLIER_VALUES.items():
        missing = {key: value for key, value in values.items() if key not in (then.get(group) or {})}
        config = replace(config, **{group: replace(getattr(config, group), **missing)})
    return config


def changed_inputs(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the keys whose values differ between two fingerprints.

    :data:`GENES` is compared only if ``then`` has it. The hash of each set is not compared: ``shards`` is the hash of all of them, and
    may differ if sets were appended (:func:`.set_changes.further_sets`).
    """
    different = [k for k in sorted(then.keys() | now.keys()) if then.get(k) != now.get(k)]
    ignored = {SETS} | ({GENES} - then.keys())
    if further_sets(then, now):
        ignored |= {"shards"}
    if first_sets(then) == first_sets(now):
        ignored |= {FIRST}
    return [k for k in different if k not in ignored]


def described_changes(
    changed: list[str], then: dict[str, str], now: dict[str, str], sets_then: Sets, sets_now: Sets
) -> str:
    """Return the result of :func:`changed_inputs` for a message, which says which of several sets (``data.shards``) changed."""
    one, two = ((sets,) if isinstance(sets, str) else sets for sets in (sets_then, sets_now))
    shown = changed_sets(then, now, one, two)
    return ", ".join(shown if key == "shards" else key for key in changed)


@dataclass
class RunState:
    """Progress of a run: its state other than weights, optimizer state and random state."""

    step: int = 0
    """Last completed optimizer step."""
    epoch: int = 0
    position: int = 0
    """Number of batches of the epoch that have been used."""
    best_step: int = 0
    """Step with the best validation score; 0 before the first score."""
    best_score: float = float("-inf")
    bad_validations: int = 0
    """Number of validations with a score since the best one."""
    skips: int = 0
    """Number of steps whose update was skipped because of a non-finite loss or gradient, or because of a spike."""
    spikes: int = 0
    """Number of spikes of the gradient norm, skipped or clipped."""
    norms: list[float] = field(default_factory=list)
    """Gradient norms of the last steps, oldest first, as of the checkpoint; empty without ``optim.spike``."""
    validated: int = 0
    """Last step after which a validation was completed; 0 if none was. Checkpoints of earlier versions count as validated."""
    stopped: str = ""
    """``steps`` or ``patience`` once training has finished, empty before."""
    extensions: list[Extension] = field(default_factory=list)
    """Sets that were appended to the data of the run, oldest first."""

    def ends_by(self, train: TrainConfig) -> str:
        """Return the key of ``train`` by which the run has no step left, empty if it has one."""
        if self.step >= train.steps:
            return "train.steps"
        patience_lost = train.patience and self.bad_validations >= train.patience
        return "train.patience" if self.stopped == "patience" and patience_lost else ""

    def reopen(self, train: TrainConfig) -> None:
        """Clear ``stopped`` if ``train.steps`` or ``train.patience`` now allow a finished run to continue."""
        if self.stopped and not self.ends_by(train):
            reason = "train.steps" if self.stopped == "steps" else "train.patience"
            log.info("the run had ended after %d steps (by %s) and continues", self.step, reason)
            self.stopped = ""

    def extend(self, sets: Sequence[str]) -> None:
        """Record the digests of appended sets, and begin a new epoch, which has the spots of all sets.

        The rest of the current epoch is not replayed, because its order does not have the appended spots.
        """
        if self.position:
            self.epoch, self.position = self.epoch + 1, 0
        self.extensions = [*self.extensions, Extension(self.step, self.epoch, tuple(sets))]

    def as_plain(self) -> dict[str, Any]:
        """Return the state as a dict for JSON; a best score that is not finite becomes None."""
        return asdict(self) | {"best_score": self.best_score if math.isfinite(self.best_score) else None}

    @classmethod
    def from_plain(cls, state: dict[str, Any]) -> RunState:
        """Return the state from the dict of :meth:`as_plain`; further keys are ignored."""
        # Checkpoints of earlier versions were written after the validation of their step, and have no entries for spikes.
        state = {"validated": state["step"], "spikes": 0, "norms": [], "extensions": []} | state
        own = {f.name: state[f.name] for f in fields(cls)}
        own["extensions"] = [Extension(e["step"], e["epoch"], tuple(e["sets"])) for e in own["extensions"]]
        return cls(**own | {"best_score": float("-inf") if own["best_score"] is None else own["best_score"]})


def check_same_run(
    run_dir: Path,
    state: dict[str, Any],
    config: RunConfig,
    fingerprint: dict[str, str],
    size: int,
    device: torch.device,
) -> None:
    """Check that a run may resume from a checkpoint.

    Warnings are logged if the schedule has changed, if results may differ by rounding, and if the checkpoint was written by an
    earlier version, which may have fitted levels on a different sample of the training spots.

    Parameters
    ----------
    run_dir
        Folder of the run, for messages.
    state
        State of the checkpoint.
    config, fingerprint, size, device
        Config, input hashes, number of ranks and device of the resuming run.

    Raises
    ------
    TrainingError
        A key outside :data:`FREE_KEYS` or the input data has changed, ``train.steps`` is below the step of the checkpoint, or sets
        were appended but the run has no step left.
    ConfigError
        The config in the checkpoint cannot be read.
    """
    # Parsed as a config: keys that did not exist then get their defaults, and renamed keys their new names.
    then = with_earlier_values(state["config"], config_from_dict(state["config"], f"the checkpoint in {run_dir}"))
    old, new = flatten(config_to_dict(then)), flatten(config_to_dict(config))
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in FREE_KEYS]
    if changed:
        shown = ", ".join(f"{k} ({old.get(k)} -> {new.get(k)})" for k in changed)
        raise TrainingError(
            f"{run_dir}: cannot resume, the config has changed: {shown}; restore these values or train into another folder"
        )
    for key in sorted(SCHEDULE_KEYS):
        if old[key] != new[key]:
            log.warning(
                "%s changed from %s to %s; the new value applies from step %d",
                key,
                old[key],
                new[key],
                state["step"] + 1,
            )
    if config.train.steps < state["step"]:
        raise TrainingError(
            f"{run_dir}: cannot resume, train.steps={config.train.steps} is below the step of the checkpoint ({state['step']}); "
            "set train.steps to at least this step"
        )
    other = changed_inputs(state["fingerprint"], fingerprint)
    if other:
        shown = described_changes(other, state["fingerprint"], fingerprint, then.data.shards, config.data.shards)
        raise TrainingError(
            f"{run_dir}: cannot resume, the input data has changed: {shown}; restore it or train into another folder"
            + (f"; {APPEND}" if "shards" in other else "")
        )
    _log_further_sets(run_dir, state, config, fingerprint)
    if GENES in fingerprint and GENES not in state["fingerprint"]:
        log.warning(
            "%s: the checkpoint was written by an earlier version of comtip-fast. If the shard set has more than levels.fit_spots=%d "
            "training spots, that version selected genes and fitted levels on a different sample of them than this version; in that case, "
            "start a new run from these weights with `start_from`",
            run_dir,
            config.levels.fit_spots,
        )
    now_run = config.engine.kind, size
    then_run = state["config"].get("engine", {}).get("kind", "auto"), state.get("world_size", 1)
    if now_run != then_run:
        log.warning(
            "engine.kind and the number of ranks changed from %s and %d to %s and %d; results may differ by rounding",
            *then_run,
            *now_run,
        )
    for what, now in (("device", device.type), ("torch", torch.__version__)):
        if state.get(what, now) != now:
            log.warning("%s changed from %s to %s; results may differ by rounding", what, state[what], now)


def _log_further_sets(run_dir: Path, state: dict[str, Any], config: RunConfig, fingerprint: dict[str, str]) -> None:
    """Log from which step on appended sets are trained on; raise :class:`TrainingError` if the run has no step left for them."""
    n = len(further_sets(state["fingerprint"], fingerprint))
    if not n:
        return
    progress = RunState.from_plain(state)
    shown, key = ", ".join(config.data.shards[-n:]), progress.ends_by(config.train)
    if key:
        raise TrainingError(
            f"{run_dir}: cannot train on {shown}: the run has ended at step {progress.step} by {key}; raise {key} to continue it with "
            "further sets, or give the sets of the checkpoint alone"
        )
    log.warning(
        "data.shards has %d further sets (%s): from step %d on, epochs are over the spots of all sets; genes and levels remain those of "
        "the sets that the run started with",
        n,
        shown,
        progress.step + 1,
    )


def random_state(device: torch.device) -> dict[str, str]:
    """Return PyTorch's random state on the CPU and, for a GPU, on ``device``, as hexadecimal text."""
    out = {"torch_rng": _hex(torch.get_rng_state())}
    if device.type == "cuda":
        out["cuda_rng"] = _hex(torch.cuda.get_rng_state(device))
    return out


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the state that :func:`random_state` returned; the GPU's state is restored only if both runs are on a GPU."""
    torch.set_rng_state(_unhex(state["torch_rng"]))
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(_unhex(state["cuda_rng"]), device)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic algorithms inside the block on CPUs; on GPUs, where they are slower, keep the user's setting."""
    before = torch.get_deterministic_debug_mode()  # 0: off, 1: warn, 2: refuse others
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _hex(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytes.fromhex(text), np.uint8).copy())
