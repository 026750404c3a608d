"""Where numbers go: metrics.jsonl always, TensorBoard and W&B when asked for, and a line for the person watching."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

from comtip_fast.config.schema import RunConfig

TIMING = ("spots_per_s", "elapsed_s")
"""Fields of a row that differ from run to run."""


class Logger(Protocol):
    """Takes one row of numbers."""

    def log(self, row: dict[str, Any]) -> None:
        """Write one row; it holds ``step`` and ``kind``."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class JsonlLogger:
    """One JSON object per line; numbers that are not finite become null."""

    def __init__(self, path: Path, up_to_step: int | None) -> None:
        """Open ``path``; rows after ``up_to_step`` are dropped, they will be made again (None keeps nothing)."""
        kept = [] if up_to_step is None or not path.exists() else _rows_up_to(path, up_to_step)
        aside = path.with_suffix(".writing")
        aside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        aside.replace(path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def log(self, row: dict[str, Any]) -> None:
        """Append and flush."""
        self._file.write(json.dumps(_finite(row)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLogger:
    """Events for TensorBoard (extra ``log``)."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("train.tensorboard=true needs TensorBoard: pip install 'comtip-fast[log]'") from error
        self._writer = SummaryWriter(str(folder))

    def log(self, row: dict[str, Any]) -> None:
        """Write every number of the row."""
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step" and math.isfinite(value):
                self._writer.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run (extra ``log``)."""

    def __init__(self, project: str, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("train.wandb needs Weights & Biases: pip install 'comtip-fast[log]'") from error
        self._run = wandb.init(project=project, dir=str(folder), config=config, resume="allow")

    def log(self, row: dict[str, Any]) -> None:
        """Send the row."""
        self._run.log({f"{row['kind']}/{k}": v for k, v in row.items() if k not in {"step", "kind"}}, step=row["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Progress:
    """A line per logged step: where we are, how fast, how long still."""

    def __init__(self, total: int, start: int, stream: TextIO | None = None) -> None:
        self.total, self.start, self.began = total, start, time.monotonic()
        self.stream = stream or sys.stderr

    def log(self, row: dict[str, Any]) -> None:
        """Print the row."""
        step = row["step"]
        if row["kind"] == "valid":
            parts = "  ".join(f"{task} {score:.4f}" for task, score in row["per_task"].items())
            self._print(
                f"step {step}/{self.total}  validation {row['score']:.4f}  ({parts}){'  best' if row['best'] else ''}"
            )
            return
        done = step - self.start
        left = (self.total - step) * (time.monotonic() - self.began) / done if done > 0 else float("nan")
        losses = "  ".join(f"{k} {row[k]:.4f}" for k in ("loss", "nce", "mfm", "pair", "level") if k in row)
        eta = f"{int(left // 60)}:{int(left % 60):02d}" if math.isfinite(left) else "-"
        self._print(f"step {step}/{self.total}  {losses}  {row['spots_per_s']:.0f} spots/s  {eta} left")

    def close(self) -> None:
        """Nothing to close."""

    def _print(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


def make_loggers(
    config: RunConfig, resolved: dict[str, Any], run_dir: Path, *, start: int, resumed: bool
) -> list[Logger]:
    """Return the loggers that the config asks for; ``resolved`` is the config as a plain dict, for W&B."""
    loggers: list[Logger] = [
        JsonlLogger(run_dir / "metrics.jsonl", start if resumed else None),
        Progress(config.train.steps, start),
    ]
    if config.train.tensorboard:
        loggers.append(TensorBoardLogger(run_dir / "tensorboard"))
    if config.train.wandb:
        loggers.append(WandbLogger(config.train.wandb, run_dir, resolved))
    return loggers


def _rows_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that was being written when the run was killed
        if row["step"] <= step:
            rows.append(row)
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
