"""Part ``curve``: comparison of the losses of a tiny config on the GPU with those on the CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from bench.evidence.batches import tiny_config
from bench.evidence.rows import Row, Rows
from bench.evidence.runs import train

TOLERANCE = {"fp32": 2e-2, "bf16": 1e-1}
"""Maximum relative difference of a loss from that on the CPU in fp32; rounding differences grow with every step."""
FIRST = {"fp32": 1e-4, "bf16": 2e-2}
"""The same for the first step, in which the weights are equal."""


def run(rows: Rows, dry: bool) -> None:
    """Train on the CPU in fp32, then on the device in bf16 and fp32, with the same initial weights, batches and draws.

    Most of the time is spent compiling, which the deadline may end: the precision of training comes first.
    """
    torch.backends.cudnn.allow_tf32 = False  # the patches' convolution would otherwise run in tf32
    n, device = (4, torch.device("cpu")) if dry else (50, torch.device("cuda"))
    with tempfile.TemporaryDirectory() as folder:
        cpu = torch.device("cpu")
        want = train(tiny_config(cpu, f"train.steps={n}"), cpu, Path(folder) / "cpu").losses
        for precision in ("bf16", "fp32"):
            try:
                config = tiny_config(device, f"train.steps={n}", f"train.precision={precision}")
                got = train(config, device, Path(folder) / precision).losses
            except Exception as error:
                rows.fail("tiny run", error, dtype=precision)
                continue
            compare(rows, want, got, precision, n)


def compare(rows: Rows, want: dict[int, float], got: dict[int, float], precision: str, n: int) -> None:
    """Send the first and every fifth loss of both runs, the first and the largest difference, and whether the loss falls."""
    for step in sorted({1, *range(5, n + 1, 5), n}):
        where = {"size": f"step {step}", "dtype": precision}
        rows.add(Row("tiny run", "loss", got[step], provider="device", **where))
        rows.add(Row("tiny run", "loss", want[step], size=f"step {step}", dtype="fp32", provider="CPU"))
    error = {step: abs(got[step] / want[step] - 1) for step in want}
    for name, value, bound in (
        ("first", error[1], FIRST[precision]),
        (f"largest of {n} steps", max(error.values()), TOLERANCE[precision]),
    ):
        status = "ok" if value <= bound else "failed"
        metric = f"relative difference from the CPU, {name}"
        rows.add(Row("tiny run", metric, value, dtype=precision, status=status, note=f"bound {bound:g}"))
    # Batches repeat every 8 steps, so sums over 8 steps are comparable.
    falls = n >= 16 and sum(got[n - i] for i in range(8)) < sum(got[1 + i] for i in range(8))
    rows.add(
        Row("tiny run", "the loss falls", str(falls), dtype=precision, status="ok" if falls or n < 16 else "failed")
    )
