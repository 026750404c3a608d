"""The demo's training step and its own operators timed alone, in alternating rounds.

    PYTHONPATH=.:kernels:data_shards python bench/train/own_operators.py [--rounds 9] [--threads 2] [--set KEY=VALUE ...]

The step is that of ``configs/demo_cpu.yaml``, with a synthetic batch: trainer, autograd, model, losses, optimizer. The operators that
it dispatched, views included, are recorded with their arguments and called again one after another from a list. What the step takes
longer is Python, autograd and the trainer. Both run in the same process; a round is one step and one pass over the list, in an order
that alternates. Inputs of the list are separate tensors, so fewer of them are in the caches than in the step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.train.host_time import Tape, replayed
from comtip_fast.collectives import SingleProcessGroup
from comtip_fast.config.io import load_config
from comtip_fast.training.distributed.signals import Signals
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.trainer import Trainer
from testkit.synthetic_task import SyntheticTask

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TILE_PX = 128


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return elapsed and CPU time of a call in ms."""
    began, used = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - used)


def measure(settings: list[str], rounds: int) -> None:
    """Print the ratio of the step to its operators: median and range over the rounds."""
    config = load_config(ROOT / "configs" / "demo_cpu.yaml", ["train.log_every=1000000", *settings])
    with tempfile.TemporaryDirectory() as folder:
        group = SingleProcessGroup()
        task = SyntheticTask(config, group, TILE_PX, CPU)
        batch = task.loader.batch(task.loader.batches(0)[0], 1, 0)
        if batch.features is not None:
            batch.features.normal_()
        task.loader.batch = lambda *_given: batch  # a run's loader builds batches while steps run
        trainer = Trainer(task, config, Path(folder), group)
        trainer.engine = make_engine(trainer.task.module, config, group)
        trainer.progress.step = 1  # the first step is logged

        def step() -> None:
            trainer._one_step(Signals())

        for _ in range(3):
            step()
        with Tape(share=True) as tape:
            step()
        repeat, _, left_out = replayed(tape)
        torch.set_flush_denormal(True)  # products in place are repeated
        repeat()
        pairs = []
        for i in range(rounds):
            first, second = (step, repeat) if i % 2 else (repeat, step)
            one, other = timed(first), timed(second)
            pairs.append((one, other) if first is step else (other, one))
    print(f"{len(tape.calls)} operators, views included ({left_out} left out), {torch.get_num_threads()} threads")
    for name, i in (("elapsed", 0), ("CPU", 1)):
        ratios = [whole[i] / bare[i] for whole, bare in pairs]
        whole, bare = (statistics.median(pair[k][i] for pair in pairs) for k in (0, 1))
        print(
            f"{name}: step {whole:.0f} ms, its operators {bare:.0f} ms; ratio of a round: median "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


def main() -> None:
    """Measure and print three lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="number of rounds (default 9)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default 2)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="further overrides (repeatable)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure(args.set, args.rounds)


if __name__ == "__main__":
    main()
