"""Compare InfoNCE on the CPU with open_clip's loss and with the unavoidable matrix products, in one run.

    python bench/kernels/bench_infonce.py [--rows 8192] [--dim 512] [--rounds 5] [--busy]

Ratios are medians over rounds (see ``rounds.py``). Peak memory is the growth of the resident set in a separate process.
open_clip's ClipLoss for one process is reimplemented here: one matrix of logits, its transpose, and two cross-entropies.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import rounds
import torch
from comtip_kernels import infonce
from comtip_kernels.infonce.cpu import tiles
from torch.nn import functional as F


def clip_loss(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return open_clip's ClipLoss at world size 1."""
    logits = scale * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T
    labels = torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def ours(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the loss of our CPU path."""
    return infonce(x, y, scale, impl="cpu")


def inputs(rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random x and y, (rows, dim), and the scale; all require gradients."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, dim, generator=g).requires_grad_() for _ in range(2))
    return x, y, torch.tensor(14.3, requires_grad=True)


def both_ways(loss: Callable[..., torch.Tensor], rows: int, dim: int) -> Callable[[], None]:
    """Return a function that runs the forward and backward pass of a loss."""
    x, y, scale = inputs(rows, dim)

    def run() -> None:
        x.grad = y.grad = scale.grad = None
        loss(x, y, scale).backward()

    return run


def products(rows: int, dim: int, n: int, exponentials: bool = False) -> Callable[[], None]:
    """Return a function with the time of a lower bound: ``n`` (3 or 4) matrix products alone, computed in tiles.

    An exact method needs at least three, the logits and two gradients, even if it stores every logit; one that stores none
    computes the logits twice. The tiles are those of the CPU path, the fastest of those tried. ``exponentials`` adds one
    in-place exponential per logit and pass, which a softmax also needs.
    """
    x, y, _ = (t.detach() for t in inputs(rows, dim))
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    dx, dy = torch.empty_like(x), torch.empty_like(y)

    def logits(i: slice, j: slice) -> torch.Tensor:
        e = x[i] @ y[j].T
        return e.exp_() if exponentials else e

    def run() -> None:
        if n == 4:
            for i, j in tiles(rows, rows):
                logits(i, j)
        dx.zero_(), dy.zero_()
        for i, j in tiles(rows, rows):
            e = logits(i, j)
            dx[i].addmm_(e, y[j])
            dy[j].addmm_(e.T, x[i])

    return run


def extra_peak_mib(name: str, rows: int, dim: int) -> float:
    """Return the peak memory in MiB that a forward and backward pass adds, median of three new processes."""
    code = f"from bench_infonce import *; print(peak({name}, {rows}, {dim}))"
    command, here = [sys.executable, "-c", code], Path(__file__).parent
    reported = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=here).stdout for _ in range(3)]
    return statistics.median(float(s.split()[-1]) for s in reported)


def peak(loss: Callable[..., torch.Tensor], rows: int, dim: int) -> float:
    """Return the added peak memory in MiB in this process, after a small call with which libraries allocate their buffers."""
    both_ways(loss, 256, dim)()
    run = both_ways(loss, rows, dim)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current resident set
    before = _high_water_kib()
    run()
    return (_high_water_kib() - before) / 1024


def _high_water_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> None:
    """Measure and print times, ratios and memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192, help="batch size B (default 8192)")
    parser.add_argument("--dim", type=int, default=512, help="width of the vectors (default 512)")
    rounds.add_options(parser, 5)
    parser.add_argument("--large", action="store_true", help="also measure the memory at B = 65,536")
    args = parser.parse_args()
    size = (args.rows, args.dim)
    runs = {
        "ours": both_ways(ours, *size),
        "open_clip": both_ways(clip_loss, *size),
        "three products": products(*size, 3),
        "four products": products(*size, 4),
        "with exponentials": products(*size, 4, exponentials=True),
    }
    times = rounds.run(runs, args.rounds, args.busy)
    for name in runs:
        print(f"{name:<17} median {rounds.ms(times, name) / 1e3:.2f} s")
    for of, to in (
        ("open_clip", "ours"),
        ("ours", "four products"),
        ("open_clip", "three products"),
        ("open_clip", "four products"),
        ("open_clip", "with exponentials"),
    ):
        print(f"{of} / {to} {rounds.ratio(times, of, to):.2f}")
    one, two = (extra_peak_mib(n, args.rows, args.dim) for n in ("ours", "clip_loss"))
    print(f"extra peak memory: ours {one:.0f} MiB, open_clip {two:.0f} MiB, ratio 1/{two / max(one, 1e-9):.1f}")
    if args.large:
        print(f"B = 65,536: ours {extra_peak_mib('ours', 65536, args.dim):.0f} MiB extra")


if __name__ == "__main__":
    main()
