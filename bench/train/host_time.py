"""Host time of an eager training step: the step of ``configs/1gpu.yaml`` with as many layers, but near-empty tensors.

    PYTHONPATH=.:kernels:data_shards python bench/train/host_time.py [--rounds 7] [--steps 20] [--bare] [--wrappers] [--set KEY=VALUE ...]

What a GPU computes takes next to no time here, so that the time of a step is what the host needs to launch its operators. The step
takes the path of a GPU (masked updates, no value read between logged rows), with this project's CPU operators instead of its
kernels, in one thread. The time depends on the machine: compare two commits on one machine, in alternating rounds.

``--wrappers`` calls the operators that launch this project's kernels instead, with launches that do nothing: what the host does for a
kernel on a GPU but for Triton's launch itself. Results are then arbitrary numbers.

``--bare`` also calls the operators of a step one after another from a list, with their arguments and nothing else: no modules, no
autograd, no trainer. Operators of the backward pass, which the step calls in C++, are called from Python here.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from comtip_kernels import dispatch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from triton.runtime.jit import JITFunction

from comtip_fast.collectives import SingleProcessGroup
from comtip_fast.config.io import load_config
from comtip_fast.runtime import devices
from comtip_fast.training.distributed.signals import Signals
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.trainer import Trainer
from testkit.synthetic_task import SyntheticTask

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TILE_PX = 16
NEAR_EMPTY = [
    "train.device=cpu",
    "train.precision=fp32",
    "train.log_every=1000000",
    "engine.compile=false",
    "data.tile_px=null",
    "data.batch_size=4",
    "panel.max_genes=3",
    "genes.per_cohort=8",
    "levels.n_levels=3",
    "vision.backbone=small",
    "vision.patch_px=8",
    "vision.depth=12",
    "vision.width=24",
    "vision.heads=12",
    "text.width=16",
    "align.dim=8",
]
"""Overrides of ``1gpu.yaml``: its depths and options, with the smallest sizes."""


class _Count(TorchDispatchMode):
    """Counts operators, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += not func.is_view
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Records operators, views included, with copies of their arguments.

    Parameters
    ----------
    share
        Whether the arguments of operators that change none are kept, not copied; they then stay allocated.
    """

    def __init__(self, *, share: bool = False) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.share = share

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keep = _detached if self.share and not func._schema.is_mutable else _copy
        self.calls.append((func, tree_map(keep, tuple(args)), tree_map(keep, kwargs or {})))
        return func(*args, **(kwargs or {}))


def _copy(value: Any) -> Any:
    """Return a copy of a tensor with the same strides, if it has no overlapping elements; any other value as it is."""
    return value.detach().clone(memory_format=torch.preserve_format) if isinstance(value, Tensor) else value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def replayed(tape: Tape) -> tuple[Callable[[], None], int, int]:
    """Return a function that calls the recorded operators, their number, and the number of those that are left out.

    Operators that fail when they are called again are left out, such as views of memory outside of a copy.
    """
    calls = [call for call in tape.calls if _runs(*call)]

    @torch.no_grad()
    def repeat() -> None:
        for func, args, kwargs in calls:
            func(*args, **kwargs)

    return repeat, len(calls), len(tape.calls) - len(calls)


@torch.no_grad()
def _runs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a recorded operator can be called again."""
    try:
        func(*args, **kwargs)
    except RuntimeError:
        return False
    return True


@contextmanager
def kernel_wrappers() -> Iterator[None]:
    """Call the operators of the Triton kernels on tensors of the CPU inside the block, with launches that do nothing."""
    with (
        patch.object(JITFunction, "run", lambda *_args, **_options: None),
        patch.object(dispatch, "can_launch", lambda device: True),
        patch.dict(dispatch._PREFERENCE, cpu=("triton", "reference")),
    ):
        yield


@contextmanager
def near_empty_trainer(settings: Sequence[str] = ()) -> Iterator[Trainer]:
    """Yield a trainer of near-empty steps, after its first steps; ``settings`` are further overrides.

    Every later ``_one_step`` is the same step; none is logged.
    """
    config = load_config(ROOT / "configs" / "1gpu.yaml", [*NEAR_EMPTY, *settings])
    # A step on the CPU takes the path of a device whose values the host must not read.
    as_gpu = patch.object(devices, "reads_are_free", lambda device: False)
    with as_gpu, tempfile.TemporaryDirectory() as folder:
        group = SingleProcessGroup()
        trainer = Trainer(SyntheticTask(config, group, TILE_PX, CPU), config, Path(folder), group)
        trainer.engine = make_engine(trainer.task.module, config, group)
        trainer.progress.step = 1  # the first step is logged
        for _ in range(3):
            trainer._one_step(Signals())
        yield trainer


def operators_of_step(trainer: Trainer) -> int:
    """Run one step and return the number of its operators, without views."""
    with _Count() as count:
        trainer._one_step(Signals())
    return count.operators


def time_bare(trainer: Trainer, rounds: int, steps: int) -> tuple[int, int, list[float]]:
    """Return (operators called, operators left out, medians of the CPU time of all calls in ms); see the module docstring."""
    with Tape() as tape:
        trainer._one_step(Signals())
    repeat, called, left_out = replayed(tape)
    torch.set_flush_denormal(True)  # products in place are repeated
    return called, left_out, [_median(repeat, steps) for _ in range(rounds)]


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="number of medians (default 7)")
    parser.add_argument("--steps", type=int, default=20, help="number of steps of a median (default 20)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="further overrides (repeatable)"
    )
    parser.add_argument("--wrappers", action="store_true", help="operators that launch kernels, without the launches")
    parser.add_argument("--bare", action="store_true", help="also time the bare operators of a step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with kernel_wrappers() if args.wrappers else nullcontext(), near_empty_trainer(args.set) as trainer:
        operators = operators_of_step(trainer)
        medians = [_median(lambda: trainer._one_step(Signals()), args.steps) for _ in range(args.rounds)]
        if args.bare:
            called, left_out, bare = time_bare(trainer, args.rounds, args.steps)
            print(
                f"{called} bare operators, views included ({left_out} left out): {statistics.median(bare):.1f} "
                f"({min(bare):.1f} to {max(bare):.1f}) ms"
            )
    print(
        f"{operators} operators; median of {args.steps} steps in ms over {args.rounds} rounds: "
        f"{statistics.median(medians):.1f} ({min(medians):.1f} to {max(medians):.1f})"
    )


def _median(step: Callable[[], None], steps: int) -> float:
    """Return the median CPU time of a call in ms; CPU time, so that other processes count less."""
    out = []
    for _ in range(steps):
        began = time.process_time()
        step()
        out.append(1e3 * (time.process_time() - began))
    return statistics.median(out)


if __name__ == "__main__":
    main()
