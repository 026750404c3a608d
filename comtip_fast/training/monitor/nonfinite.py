"""Reports of steps whose loss or gradient is not finite, or whose gradient norm is a spike."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from comtip_fast.training.checkpoint.rows import NONFINITE, SPIKES
from comtip_fast.training.monitor.diagnostics import diagnostic
from comtip_fast.training.monitor.loggers import append_row
from comtip_fast.training.pending import FinishedStep


def report_nonfinite(
    path: Path, step: int, epoch: int, position: int, spots: np.ndarray, parts: dict[str, float], gradients: list[str]
) -> None:
    """Append a row on a non-finite step to ``nonfinite.jsonl``; a failed write is logged as a warning.

    Parameters
    ----------
    path
        Path of the file.
    step, epoch, position
        Optimizer step, epoch, and position of the batch in the epoch.
    spots
        Spot indices of the global batch.
    parts
        Losses over all ranks, by name.
    gradients
        Names of parameters whose gradient is not finite.
    """
    record = {
        "step": step,
        "epoch": epoch,
        "position": position,
        "parts": parts,
        "gradients": gradients,
        "spot_index": spots.tolist(),
    }
    diagnostic(f"writing {NONFINITE}", lambda: append_row(path, record), None)


def report_spike(path: Path, done: FinishedStep, parts: dict[str, float], policy: str) -> None:
    """Append a row on a spike to ``spikes.jsonl``; a failed write is logged as a warning.

    Parameters
    ----------
    path
        Path of the file.
    done
        The step.
    parts
        Losses over all ranks, by name.
    policy
        ``optim.spike.policy``, which says whether the update was skipped or clipped.
    """
    step = done.pending
    record = {"step": step.step, "epoch": step.epoch, "position": step.position, "policy": policy}
    record |= {"grad_norm": done.norm, "limit": done.limit, "parts": parts, "spot_index": step.spots.tolist()}
    diagnostic(f"writing {SPIKES}", lambda: append_row(path, record), None)


def nonfinite_message(path: Path, step: int, spots: np.ndarray, parts: dict[str, float], gradients: list[str]) -> str:
    """Return an error message that names the non-finite loss parts and gradients, the first spots, and the file at ``path``."""
    bad = [k for k, v in parts.items() if not math.isfinite(v)]
    named = [k for k in bad if k != "loss"]
    what = ("the loss" if bad else "the gradient") + " is not finite"
    if named:
        what = (
            f"loss part {named[0]} is not finite"
            if len(named) == 1
            else f"loss parts {', '.join(named)} are not finite"
        )
    first = f" (non-finite gradients of {len(gradients)} parameters, first {gradients[0]})" if gradients else ""
    some = ", ".join(str(i) for i in spots[:5].tolist())
    return f"step {step}: {what}{first}; spots {some} ...; the full batch is in {path}"
