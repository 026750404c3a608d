"""Time of a training step at two commits, in paired and interleaved rounds.

    git worktree add ../before COMMIT
    PYTHONPATH=.:kernels:data_shards python bench/train/paired_steps.py --before ../before --shards runs/demo/shards
    ... --config configs/demo_cpu.yaml --rounds 20 --steps 8 --threads 2 --set KEY=VALUE

Both checkouts run in the same environment, each in a process of its own that has the model and the data loaded and waits. A round
runs the same steps of both, one after the other, in alternating order; its ratio is time after / time before. The last line has the
median ratio and its interval of 95 % (order statistics, without assumptions on the distribution), of elapsed and of CPU time.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def worker(args: argparse.Namespace) -> None:
    """Load the run of the checkout in the working folder, then run ``--steps`` steps for each line of the standard input."""
    import torch

    from comtip_fast.collectives import SingleProcessGroup
    from comtip_fast.config.io import load_config
    from comtip_fast.training.distributed.signals import Signals
    from comtip_fast.training.engines.factory import make_engine
    from comtip_fast.training.task import build_task
    from comtip_fast.training.trainer import Trainer

    torch.set_num_threads(args.threads)
    fixed = ("train.validate_every=0", "train.log_every=1000000", "train.device=cpu")
    config = load_config(args.config, [f"data.shards={args.shards}", *fixed, *args.set])
    group = SingleProcessGroup()
    task = build_task(config, torch.device("cpu"), group)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(task, config, Path(folder), group)
        trainer.engine = make_engine(task.module, config, group)
        task.prepare()
        trainer.progress.step = 1  # the first step is logged
        for _ in range(3):
            trainer._one_step(Signals())
        print("ready", flush=True)
        for _ in sys.stdin:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(args.steps):
                trainer._one_step(Signals())
            print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


class Checkout:
    """The process of one checkout, which waits between rounds.

    Parameters
    ----------
    folder
        Root of the checkout, working folder of the process.
    command
        Script and arguments. The script prints ``ready``, and then a line of numbers for each line of its standard input.
    """

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        parts = (".", "kernels", "data_shards", "bench/kernels")
        # Threads of a process that waits must not spin, or it would slow the other one.
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(folder / part) for part in parts),
            "OMP_WAIT_POLICY": "passive",
            "KMP_BLOCKTIME": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._read("ready")

    def _read(self, expected: str = "") -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not expected or line.strip() == expected:
                return line
        raise SystemExit(f"the run of {self.process.args} ended")

    def times(self) -> list[float]:
        """Return the numbers of one round, in s."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return [float(text) for text in self._read().split()]


def compare(before: Checkout, after: Checkout, names: Sequence[str], rounds: int) -> None:
    """Run the rounds in alternating order, print each, and the ratio after / before of every number."""
    ratios: list[list[float]] = [[] for _ in names]
    for number in range(rounds):
        order = (before, after) if number % 2 == 0 else (after, before)
        times = {id(checkout): checkout.times() for checkout in order}
        pairs = list(zip(times[id(before)], times[id(after)], strict=True))
        for own, (earlier, later) in zip(ratios, pairs, strict=True):
            own.append(later / earlier)
        shown = "  ".join(f"{n} {1e3 * b:.2f} {1e3 * a:.2f} ms" for n, (b, a) in zip(names, pairs, strict=True))
        print(f"round {number + 1}, before and after: {shown}", flush=True)
    for name, own in zip(names, ratios, strict=True):
        median, low, high = interval(own)
        print(f"{name}, after / before: median {median:.3f}, 95 % interval {low:.3f} to {high:.3f}")


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Return the median and the bounds of its 95 % interval, which are order statistics of a binomial distribution."""
    n, ordered = len(ratios), sorted(ratios)
    tail, k = 0.0, 0
    while k < n // 2 and tail + math.comb(n, k) / 2**n <= 0.025:
        tail += math.comb(n, k) / 2**n
        k += 1
    low = max(0, k - 1)
    return statistics.median(ratios), ordered[low], ordered[n - 1 - low]


def main() -> None:
    """Run the rounds and print each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the earlier commit")
    parser.add_argument("--after", type=Path, default=Path(), help="checkout of the later commit (default: here)")
    parser.add_argument("--shards", type=Path, required=True, help="shard set that both read")
    parser.add_argument("--config", type=Path, default=Path("configs/demo_cpu.yaml"), help="config of each checkout")
    parser.add_argument("--rounds", type=int, default=20, help="paired rounds (default 20)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a round (default 8)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (default 2)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override (repeatable)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    if args.before is None:
        parser.error("--before is missing: a checkout of the earlier commit")

    def start(folder: Path) -> Checkout:
        config = args.config if args.config.is_absolute() else folder / args.config
        run = [
            f"--config={config}",
            f"--shards={args.shards.resolve()}",
            f"--steps={args.steps}",
            f"--threads={args.threads}",
        ]
        return Checkout(
            folder, [str(Path(__file__).resolve()), "--worker", *run, *(f"--set={item}" for item in args.set)]
        )

    compare(start(args.before.resolve()), start(args.after.resolve()), ("elapsed time", "CPU time"), args.rounds)


if __name__ == "__main__":
    main()
