"""InfoNCE on the CPU, compared with open_clip's loss and with the matrix products that it cannot avoid, in one run.

    python bench/kernels/bench_infonce.py [--rows 8192] [--dim 512] [--rounds 5] [--busy]

Medians of the ratios within a round (see ``rounds.py``). Peak memory is the growth of the resident set in a process of its own.
open_clip's ClipLoss for one process is reimplemented here: one matrix of logits, its transpose, two cross-entropies.
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
    """open_clip's ClipLoss at world size 1."""
    logits = scale * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T
    labels = torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def ours(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Run our CPU path."""
    return infonce(x, y, scale, impl="cpu")


def inputs(rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, y, scale with gradients."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, dim, generator=g).requires_grad_() for _ in range(2))
    return x, y, torch.tensor(14.3, requires_grad=True)


def both_ways(loss: Callable[..., torch.Tensor], rows: int, dim: int) -> Callable[[], None]:
    """Return a function that runs forward and backward."""
    x, y, scale = inputs(rows, dim)

    def run() -> None:
        x.grad = y.grad = scale.grad = None
        loss(x, y, scale).backward()

    return run


def products(rows: int, dim: int, n: int, exponentials: bool = False) -> Callable[[], None]:
    """Return a lower bound: the matrix products alone, in tiles that share the memory of one tile.

    No exact method can avoid three (``n``), even one that stores every logit: logits and two gradients. A method that
    stores none computes the logits twice. The tiles are those of the CPU path, the fastest of those tried.
    ``exponentials`` adds one exponential of each logit and pass, in place, which a softmax needs too.
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
    """Return the peak memory in MiB that a forward and backward pass adds in a new process: the median of three."""
    code = f"from bench_infonce import *; print(peak({name}, {rows}, {dim}))"
    command, here = [sys.executable, "-c", code], Path(__file__).parent
    reported = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=here).stdout for _ in range(3)]
    return statistics.median(float(s.split()[-1]) for s in reported)


def peak(loss: Callable[..., torch.Tensor], rows: int, dim: int) -> float:
    """Measure in this process, after a small call with which libraries allocate their buffers."""
    both_ways(loss, 256, dim)()
    run = both_ways(loss, rows, dim)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = _high_water_kib()
    run()
    return (_high_water_kib() - before) / 1024


def _high_water_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=512)
    rounds.add_options(parser, 5)
    parser.add_argument("--large", action="store_true", help="also B = 65,536, memory only")
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
