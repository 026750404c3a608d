"""Part ``resume``: a run that is stopped by a signal and resumed must be bit-identical to an uninterrupted run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from bench.evidence.batches import tiny_config
from bench.evidence.rows import Row, Rows
from bench.evidence.runs import Result, different, train


def run(rows: Rows, dry: bool) -> None:
    """Compare a repeated and a resumed run with an uninterrupted one, in the precisions of training."""
    device = torch.device("cpu" if dry else "cuda")
    n, stop = (4, 2) if dry else (24, 11)
    for precision in ("bf16",) if dry else ("bf16", "fp32"):
        config = tiny_config(device, f"train.steps={n}", f"train.precision={precision}", "train.checkpoint_every=8")
        where = {"size": f"{n} steps, stopped in step {stop}", "dtype": precision}
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            try:
                whole = train(config, device, root / "whole")
                again = train(config, device, root / "again")
                train(config, device, root / "stopped", stop_at=stop)
                resumed = train(config, device, root / "stopped", resume=True)
            except Exception as error:
                rows.fail("resume", error, **where)
                continue
        report(rows, "a second run", whole, again, where)
        report(rows, "a resumed run", whole, resumed, where)


def report(rows: Rows, name: str, want: Result, got: Result, where: dict[str, str]) -> None:
    """Send the numbers of weights, moments and losses that differ between two runs."""
    for metric, found, of in (
        ("weights with other bits", different(want.weights, got.weights), len(want.weights)),
        ("moments with other bits", different(want.moments, got.moments), len(want.moments)),
        ("losses with other bits", [s for s, x in want.losses.items() if got.losses.get(s) != x], len(want.losses)),
    ):
        status, note = ("failed" if found else "ok"), ", ".join(map(str, found[:4]))
        rows.add(Row(name, metric, f"{len(found)} of {of}", status=status, note=note, **where))
