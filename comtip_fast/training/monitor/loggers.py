"""Loggers of a run: metrics.jsonl, progress on the terminal and, optionally, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

from comtip_fast.config.schema import RunConfig
from comtip_fast.metrics import finite_or_none
from comtip_fast.runtime.streams import write_line
from comtip_fast.training.checkpoint.rows import keep_rows_up_to

log = logging.getLogger("comtip_fast")


class Logger(Protocol):
    """Writes rows of metrics."""

    def log(self, row: dict[str, Any]) -> None:
        """Write one row, which includes ``step`` and ``kind``."""
        ...

    def close(self) -> None:
        """Release files and connections."""
        ...


class JsonlLogger:
    """Writes one JSON object per line; numbers that are not finite become null."""

    def __init__(self, path: Path, up_to_step: int | None, *, validated: bool = True) -> None:
        """Open ``path`` and drop the rows that the run will repeat.

        These are the rows after ``up_to_step`` (None: all rows) and, unless ``validated``, the validation of ``up_to_step``.
        """
        if up_to_step is None:
            path.unlink(missing_ok=True)
        else:
            keep_rows_up_to(path, up_to_step, validated=validated)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def log(self, row: dict[str, Any]) -> None:
        """Append the row and flush the file."""
        self._file.write(json.dumps(finite_or_none(row)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLogger:
    """Writes events for TensorBoard (extra ``log``); raises ValueError if TensorBoard is not installed."""

    def __init__(self, folder: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "train.tensorboard=true: TensorBoard is not installed; run pip install 'comtip-fast[log]', or set "
                "train.tensorboard=false"
            ) from error
        # A resumed run repeats the steps after its checkpoint; purge_step hides their earlier events.
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def log(self, row: dict[str, Any]) -> None:
        """Write every finite number of the row."""
        for key, value in _numbers(row).items():
            if math.isfinite(value):
                self._writer.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbLogger:
    """Writes rows to a Weights & Biases run (extra ``log``), which a resumed run continues.

    Raises ValueError if Weights & Biases is not installed.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"train.wandb={project}: Weights & Biases is not installed; run pip install 'comtip-fast[log]', or leave "
                "train.wandb empty"
            ) from error
        known = folder / "wandb_id"
        if not known.exists():
            known.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = wandb.init(project=project, dir=str(folder), config=config, id=known.read_text(), resume="allow")

    def log(self, row: dict[str, Any]) -> None:
        """Send every number of the row."""
        self._run.log({f"{row['kind']}/{key}": value for key, value in _numbers(row).items()}, step=row["step"])

    def close(self) -> None:
        """Finish the Weights & Biases run."""
        self._run.finish()


class BestEffort:
    """Forwards rows to another logger; its first error is logged as a warning and disables it."""

    def __init__(self, logger: Logger) -> None:
        self._logger: Logger | None = logger
        self._name = type(logger).__name__

    def log(self, row: dict[str, Any]) -> None:
        """Forward the row, unless the logger has failed."""
        self._attempt(lambda logger: logger.log(row))

    def close(self) -> None:
        """Close the logger."""
        self._attempt(lambda logger: logger.close())

    def _attempt(self, work: Callable[[Logger], None]) -> None:
        """Call ``work`` with the logger; on an error, log a warning and disable the logger."""
        if self._logger is None:
            return
        try:
            work(self._logger)
        except Exception as error:  # any error: metrics.jsonl remains the record of the run
            self._logger = None
            log.warning(
                "%s failed and is disabled, training continues: %s: %s", self._name, type(error).__name__, error
            )


class Progress:
    """Prints a line per row: progress, losses, speed and remaining time of a step, or the scores of a validation."""

    def __init__(self, total: int, start: int, stream: TextIO | None = None) -> None:
        self.total, self.start, self.began = total, start, time.monotonic()
        self.stream = stream or sys.stderr

    def log(self, row: dict[str, Any]) -> None:
        """Print one line for the row."""
        step = row["step"]
        if row["kind"] == "valid":
            parts = "  ".join(f"{cohort} {score:.4f}" for cohort, score in row["per_cohort"].items())
            if "r1" in row:
                parts += f"  recall@1 {row['r1']:.3f} image to text, {row['t1']:.3f} text to image"
            self._print(
                f"step {step}/{self.total}  validation {row['score']:.4f}  ({parts}){'  best' if row['best'] else ''}"
            )
            return
        done = step - self.start
        left = (self.total - step) * (time.monotonic() - self.began) / done if done > 0 else float("nan")
        losses = "  ".join(f"{k} {row[k]:.4f}" for k in ("loss", "nce", "mfm", "pair", "level") if k in row)
        eta = f"{int(left // 60)}:{int(left % 60):02d} min" if math.isfinite(left) else "-"
        speed = f"{row['spots_per_s']:.0f} spots/s" if "spots_per_s" in row else ""
        if "mfu" in row:
            speed += f"  {row['mfu']:.0%} MFU"
        # Waiting times are printed from 5 % on.
        for key, text in (("loader_wait_share", "waiting for tiles"), ("comm_share", "in collectives")):
            if row.get(key, 0.0) >= 0.05:
                speed += f"  {row[key]:.0%} {text}"
        self._print(f"step {step}/{self.total}  {losses}  {speed}  {eta} left")

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    def _print(self, text: str) -> None:
        write_line(text, self.stream)


def make_loggers(
    config: RunConfig, resolved: dict[str, Any], run_dir: Path, *, start: int, resumed: bool, validated: bool = True
) -> list[Logger]:
    """Return the loggers that the config selects.

    Parameters
    ----------
    config, resolved
        Config of the run, and the config as a dict for Weights & Biases.
    run_dir
        Folder of the run.
    start
        Step after which training starts.
    resumed
        Whether the run resumes, so that rows up to ``start`` are kept.
    validated
        Whether the validation of step ``start``, if one is due, was completed before the checkpoint was written.

    Raises
    ------
    ValueError
        TensorBoard or Weights & Biases is requested but not installed.
    """
    loggers: list[Logger] = [
        JsonlLogger(run_dir / "metrics.jsonl", start if resumed else None, validated=validated),
        Progress(config.train.steps, start),
    ]
    if config.train.tensorboard:
        loggers.append(TensorBoardLogger(run_dir / "tensorboard", start))
    if config.train.wandb:
        loggers.append(WandbLogger(config.train.wandb, run_dir, resolved))
    return loggers


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row; numbers of nested dicts are named ``group/name``."""
    out: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out |= {f"{key}/{name}": number for name, number in _numbers(value).items()}
        elif isinstance(value, (int, float)) and key != "step":
            out[key] = float(value)
    return out


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a JSONL file; numbers that are not finite become null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite_or_none(row)) + "\n")
