"""Measure the training steps of ``comtip bench step`` in interleaved rounds, and write the table."""

from __future__ import annotations

import csv
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from comtip_fast.benchmarks.rounds import describe_machine
from comtip_fast.benchmarks.step.clock import OTHER, PARTS
from comtip_fast.benchmarks.step.contender import StepContender
from comtip_fast.runtime import devices
from comtip_fast.runtime.torch_internals import CPU_ATTENTION, CPU_ATTENTION_BACKWARD, TorchDispatchMode, packet_of

log = logging.getLogger("comtip_fast")
RATE_WIDTH = {"cpu": 1024, "cuda": 8192}
"""Side of the square matrices whose product is timed, by type of device."""


@dataclass
class Measured:
    """Measurements of one training step."""

    name: str
    samples_per_s: list[float] = field(default_factory=list)
    """One value per round."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Mean seconds per step of each part."""
    gflop: float = 0.0
    """Floating-point operations of the matrix products in one step, recomputation included, in 10^9; counted, not measured."""
    samples: int = 0
    """Samples of the counted step; the last batch of an epoch, which can be smaller, is not trained on."""
    peak_mb: float = 0.0
    """Peak memory of one step in MB, above what was allocated before the step, gradients included."""
    share: list[float] = field(default_factory=list)
    """Counted FLOP/s, divided by the FLOP/s of large matrix products that were timed in the same round; one value per round."""


def measure(contenders: Sequence[StepContender], *, rounds: int, steps: int, out: Path) -> list[Measured]:
    """Measure all training steps; each runs once before anything is timed.

    Parameters
    ----------
    contenders
        The training steps. Spots are counted in every run of a step, floating-point operations in the first run only.
    rounds, steps
        Number of rounds, and number of timed runs of every step in a round; one more before them is not timed.
    out
        Folder for the profile of each step, ``profile_<name>.txt``.
    """
    found = [Measured(c.name) for c in contenders]
    for contender, result in zip(contenders, found, strict=True):
        log.info("counting the operations of the first step of %s", contender.name)
        batch = contender.load()
        result.samples, result.gflop = contender.n_samples(batch), counted_gflop(contender, batch)
    for number in range(rounds):
        rate = product_rate(contenders[0].device, contenders[0].config.train.precision)
        log.info("round %d of %d: a large matrix product runs at %.0f GFLOP/s", number + 1, rounds, rate / 1e9)
        for contender, result in zip(contenders, found, strict=True):
            settle(contender)
            elapsed, samples = _run(contender, steps, result.samples)
            result.samples_per_s.append(samples / elapsed)
            result.share.append(steps * result.gflop * 1e9 / elapsed / rate)
    for contender, result in zip(contenders, found, strict=True):
        settle(contender)
        result.seconds = seconds_by_part(contender, steps, result.samples)
        path = out / f"profile_{contender.name.replace(' ', '_')}.txt"
        result.peak_mb = peak_mb(contender, next_batch(contender, result.samples), path)
    return found


def next_batch(contender: StepContender, samples: int) -> Any:
    """Return the next batch, or the one after it if it has fewer than ``samples`` samples, as the last batch of an epoch can have.

    What a step computes per batch, such as our table of sentences, would make such a batch slower per sample for one step than for
    another, and its operations are not those that were counted.
    """
    batch = contender.load()
    return batch if contender.n_samples(batch) >= samples else contender.load()


def settle(contender: StepContender) -> None:
    """Bring a step and its loader into the state of a long run: discard batches that were prepared in other steps' time, and train once.

    A loader that is slower than its step would otherwise take its batches from this stock, and the step would never wait.
    """
    for _ in range(contender.prepared_ahead):
        contender.load()
    contender.train(contender.load())
    _wait(contender.device)


def _run(contender: StepContender, steps: int, least: int) -> tuple[float, int]:
    """Run ``steps`` steps on batches of at least ``least`` samples, see :func:`next_batch`.

    Returns
    -------
    tuple
        The elapsed seconds, including loading, and the number of samples in the batches.
    """
    began, samples = time.perf_counter(), 0
    for _ in range(steps):
        batch = next_batch(contender, least)
        contender.train(batch)
        samples += contender.n_samples(batch)
    _wait(contender.device)
    return time.perf_counter() - began, samples


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device, precision: str) -> float:
    """Return the highest FLOP/s of six large square matrix products, in the precision and on the threads of the run."""
    n = RATE_WIDTH.get(device.type, 1024)
    dtype = torch.bfloat16 if devices.in_bf16(precision, device) else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * n**3 / best


def counted_gflop(contender: StepContender, batch: Any) -> float:
    """Train one step on ``batch``, and return the floating-point operations of its matrix products in GFLOP (10^9 operations).

    They are computed from the shapes of the operands, by the formulas that are registered in ``torch.utils.flop_counter``.
    """
    with _FlopCount() as counter:
        contender.train(batch)
    return counter.flops / 1e9


class _FlopCount(TorchDispatchMode):
    """Sums FLOPs without tracking modules; ``FlopCounterMode`` would multiply the memory of a step of checkpointed chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(packet_of(func))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        elif packet_of(func) is CPU_ATTENTION:
            self.flops += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif packet_of(func) is CPU_ATTENTION_BACKWARD:
            self.flops += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        return out


def seconds_by_part(contender: StepContender, steps: int, least: int) -> dict[str, float]:
    """Train ``steps`` more steps, and return the mean seconds per step of every part, forward and backward.

    Batches have at least ``least`` samples, see :func:`next_batch`.
    """
    clock = contender.clock
    clock.seconds.clear()
    with contender.timed():
        clock.start()
        for _ in range(steps):
            contender.train(next_batch(contender, least))
        clock.stop()
    return {part: clock.seconds[part] / steps for part in (*PARTS, OTHER)}


def peak_mb(contender: StepContender, batch: Any, path: Path | None = None) -> float:
    """Train one step on ``batch``, and return its peak memory in MB above its start, the gradients of the step included.

    Parameters
    ----------
    contender, batch
        A training step, and a batch of its :meth:`StepContender.load`.
    path
        File for the 30 slowest operators of the step; None writes none.
    """
    device = contender.device
    contender.clear_gradients()  # otherwise those of the last step would be part of the start, for steps that keep them until now
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with torch.profiler.profile(activities=activities, profile_memory=device.type == "cpu", acc_events=True) as run:
        contender.train(batch)
        _wait(device)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run.key_averages().table(sort_by=key, row_limit=30), encoding="utf-8")
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return _peak_mb(run)


def _peak_mb(run: torch.profiler.profile) -> float:
    """Return the highest sum of allocations minus frees that the profiler recorded, in MB."""
    events: list[Any] = run.profiler.kineto_results.events()  # type: ignore[union-attr]
    live = top = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return top / 1e6


# -- results -----------------------------------------------------------------------------------------------------


def ratio(of: Measured, to: Measured) -> tuple[float, float, float]:
    """Return the median, minimum and maximum over rounds of the ratio of two steps' samples per second (``of`` / ``to``)."""
    paired = [a / b for a, b in zip(of.samples_per_s, to.samples_per_s, strict=True)]
    return median(paired), min(paired), max(paired)


def rows_of(found: Sequence[Measured]) -> list[dict[str, str]]:
    """Return one row per training step, as text; ratios are samples per second of the first step divided by those of the row."""
    rows = []
    for m in found:
        middle, low, high = ratio(found[0], m)
        row = {
            "step": m.name,
            "samples_per_s": f"{median(m.samples_per_s):.3g}",
            "lowest": f"{min(m.samples_per_s):.3g}",
            "highest": f"{max(m.samples_per_s):.3g}",
            f"{found[0].name}_is_faster_by": f"{middle:.2f}",
            "ratio_lowest": f"{low:.2f}",
            "ratio_highest": f"{high:.2f}",
            "gflop": f"{m.gflop:.4g}",
            "share_of_product_rate": f"{median(m.share):.3f}",
            "peak_mb": f"{m.peak_mb:.4g}",
        }
        rows.append(row | {f"{part}_s": f"{seconds:.4f}" for part, seconds in m.seconds.items()})
    return rows


def table_of(found: Sequence[Measured]) -> list[str]:
    """Return the lines of the printed table: a row per quantity, a column per training step."""
    rows = rows_of(found)
    width = max(24, *(len(name) for name in rows[0]))
    return [f"{name:<{width}}" + "".join(f"{row[name]:>16}" for row in rows) for name in rows[0]]


def write_results(folder: Path, found: Sequence[Measured], setting: str) -> Path:
    """Write ``step.csv`` to ``folder`` and return the path; the first lines of the file name the machine and the setting."""
    folder.mkdir(parents=True, exist_ok=True)
    path, rows = folder / "step.csv", rows_of(found)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {describe_machine(len(os.sched_getaffinity(0)))}\n# {setting}\n")
        out = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    return path
