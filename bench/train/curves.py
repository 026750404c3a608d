"""Loss curves of whole training runs with W ranks, and of runs resumed under another engine, compared with one process.

    python bench/train/curves.py                 50 steps, every engine, W = 1, 2, 4, as a Markdown table
    python bench/train/curves.py --runs offload  the same with CPU offload (nvme: NVMe offload, needs libaio; frozen: encoders that thaw;
                                                 spike-skip, spike-clip: spikes of the gradient norm, with --steps 30)
    python bench/train/curves.py --golden FILE   write the curve of one process, the content of tests/golden/loss_curve.json

Every run uses the trainer with averaged weights, checkpoints, validation and export. A run that changes its engine is stopped half way
by a SIGTERM to one rank and resumes from the checkpoint. Deviation is the largest |loss - loss of one process| / loss so far; that of
the averaged weights of the last step is the norm of the difference, over all of them, divided by their norm.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from comtip_fast.collectives import Group, SingleProcessGroup
from comtip_fast.config.io import load_config
from comtip_fast.data.batch import Batch
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.distributed.failures import RestartError
from comtip_fast.training.distributed.process_group import init_distributed
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer
from testkit.distributed import run_distributed
from testkit.tiny import tiny_shards

LIMITS = {10: 1e-5, 50: 1e-3}
AVERAGED = "optim.ema=0.9"
"""Setting of all runs; an average of the weights changes no loss."""
AVERAGE_LIMIT = 1e-4
"""Limit on the deviation of the averaged weights."""
TINY = [
    "data.batch_size=22",
    "data.views=1",
    "genes.per_cohort=30",
    "genes.held_out_from=10",
    "genes.held_out_every=4",
    "panel.min_genes=1",
    "panel.max_genes=24",
    "levels.n_levels=5",
    "levels.min_positive=10",
    "vision.patch_px=16",
    "vision.width=32",
    "vision.depth=1",
    "vision.heads=2",
    "vision.target=ema",
    "text.width=32",
    "text.depth=1",
    "text.heads=2",
    "text.max_tokens=6",
    "align.dim=32",
    "optim.warmup_steps=5",
    "train.log_every=1",
    "train.patience=0",
    "train.validate_every=25",
    "train.threads=1",
    "train.device=cpu",
]


@dataclass(frozen=True)
class Run:
    """A run: its engine and, if it is stopped half way, the engine that resumes it."""

    first: str = "ddp"
    then: str = ""
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name that is valid as a file name."""
        return "-".join([self.first, *([self.then] if self.then else []), *self.settings]).replace("=", "_")


ALL = [
    *(Run(e) for e in ("ddp", "zero0", "zero1", "zero2", "zero3")),
    Run("ddp", settings=("engine.loss_form=ring",)),
    Run("ddp", settings=("engine.micro_batches=3",)),
    *(Run(f"zero{stage}", settings=("engine.micro_batches=3",)) for stage in range(4)),
    Run("zero1", "zero3"),
    Run("zero3", "ddp"),
    Run("ddp", "zero2"),
]
QUICK = [
    Run("ddp"),
    Run("zero1", "zero3", ("engine.loss_form=ring",)),
    Run("zero3", "ddp", ("engine.micro_batches=3",)),
]

OFFLOAD = [
    *(Run(f"zero{n}", settings=("engine.offload_optimizer=cpu",)) for n in (1, 2)),
    Run("zero3", "zero3", ("engine.offload_optimizer=cpu", "engine.offload_param=cpu")),
]
NVME = [
    Run("zero3", "zero3", ("engine.offload_optimizer=nvme", "engine.offload_param=nvme")),
    Run("zero3", "zero3", ("engine.offload_optimizer=cpu", "engine.offload_param=nvme")),
]
# Parameters thaw before and after the step at which a run is stopped.
FROZEN = [
    *(Run(e) for e in ("ddp", "zero0", "zero1", "zero2", "zero3")),
    Run("ddp", "ddp"),
    Run("ddp", settings=("engine.micro_batches=3",)),
    Run("zero2", "zero3"),
    Run("zero3", "ddp", ("engine.micro_batches=3",)),
]
FROZEN_QUICK = [Run("ddp", "ddp"), Run("zero2", "zero3")]
SPIKES = [Run("ddp"), Run("zero1", "zero2"), Run("zero3")]
RUNS = {
    "all": ALL,
    "quick": QUICK,
    "offload": OFFLOAD,
    "nvme": NVME,
    "frozen": FROZEN,
    "frozen-quick": FROZEN_QUICK,
    "spike-skip": SPIKES,
    "spike-clip": SPIKES,
}
THAW = [
    "optim.freeze=[[vision, 4], [genes.blocks, 8], [project_text.skip, 0]]",
    "optim.vision.lr_scale=0.5",
    "optim.vision.layer_decay=0.7",
    "optim.heads.weight_decay=0.2",
]
# Settings of all runs and of the one process that they are compared with. DeepSpeed keeps tensors smaller than 1 MiB per rank
# in memory.
COMMON = {
    "nvme": ["vision.width=512"],
    "frozen": THAW,
    "frozen-quick": THAW,
    # So low a factor that some of the steps after the twentieth are spikes.
    **{f"spike-{policy}": [f"optim.spike.policy={policy}", "optim.spike.factor=1.05"] for policy in ("skip", "clip")},
}


def engine(name: str) -> list[str]:
    """Return the config overrides of an engine by its short name."""
    if not name.startswith("zero"):
        return ["engine.kind=auto"]
    stage = f"engine.zero_stage={name[-1]}"
    return ["engine.kind=deepspeed", stage, "engine.persist_elements=100", "engine.bucket_mb=0.05"]


def train(
    shards: str, folder: Path, steps: int, group: Group, *, settings: list[str], stop: int = 0, resume: bool = False
) -> None:
    """Start or resume a run as one rank of the group; at step ``stop`` the last rank receives a SIGTERM.

    With DeepSpeed, a run ends when parameters thaw, and is resumed as by a launcher.
    """
    config = load_config(None, [*TINY, f"data.shards={shards}", f"train.steps={steps}", *settings])
    task = build_task(config, torch.device("cpu"), group)
    batch = task.batch

    def batch_or_stop(spots: np.ndarray, step: int, epoch: int) -> Batch:
        if step == stop and group.rank == group.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(spots, step, epoch)

    task.batch = batch_or_stop  # type: ignore[method-assign]
    try:
        Trainer(task, config, folder, group).fit(resume=resume)
    except RestartError as error:
        if "thaws parameters" not in str(error):
            raise
        train(shards, folder, steps, group, settings=settings, stop=stop, resume=True)


def rank(shards: str, folder: Path, steps: int, which: str) -> None:
    """Execute all runs as one rank."""
    torch.set_num_threads(1)
    logging.getLogger("comtip_fast").setLevel(logging.ERROR)
    with init_distributed(120, "cpu") as group:
        for run in RUNS[which]:
            half, out = steps // 2 if run.then else 0, folder / run.name
            more = [*run.settings, *COMMON.get(which, []), AVERAGED, f"engine.nvme_path={folder / 'nvme'}"]
            train(shards, out, steps, group, settings=[*engine(run.first), *more], stop=half)
            if run.then:
                train(shards, out, steps, group, settings=[*engine(run.then), *more], resume=True)


def losses(folder: Path) -> list[float]:
    """Return the loss of every step of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def deviations(found: list[float], wanted: list[float]) -> dict[int, float]:
    """Return {n: largest relative deviation over the first n steps} for n = 10 and 50, if the run has as many."""
    assert len(found) == len(wanted), f"the run has {len(found)} steps, not {len(wanted)}"
    off = [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]
    return {n: max(off[:n]) for n in LIMITS if n <= len(off)}


def off_average(found: Path, wanted: Path, step: int) -> float:
    """Return the relative deviation of the averaged weights of two runs; infinity if they average different parameters."""
    one, two = (
        checkpoints.load(checkpoints.folder_of(folder / "checkpoints", step), moments=False).ema
        for folder in (found, wanted)
    )
    if one.keys() != two.keys() or not one:
        return math.inf
    a, b = (torch.cat([values[name].double().flatten() for name in two]) for values in (one, two))
    return float((a - b).norm() / b.norm())


def run(shards: str, folder: Path, steps: int, worlds: list[int], which: str) -> list[dict[str, object]]:
    """Train with one process and with every world size; return one row of deviations per world size and run."""
    torch.set_num_threads(1)  # the same as in the ranks: another summation order changes the last bits
    settings = [*engine("single"), *COMMON.get(which, []), AVERAGED]
    train(shards, folder / "one", steps, SingleProcessGroup(), settings=settings)
    wanted, rows = losses(folder / "one"), []
    for world in worlds:
        below = folder / str(world)
        arguments = [__file__, "--rank", shards, str(below), "--steps", str(steps), "--runs", which]
        run_distributed(arguments, world, timeout_s=1800, fork=True)
        for one in RUNS[which]:
            off = deviations(losses(below / one.name), wanted)
            average = off_average(below / one.name, folder / "one", steps)
            ok = all(off[n] <= LIMITS[n] for n in off) and average <= AVERAGE_LIMIT
            rows.append({"W": world, "run": one, "off": off, "average": average, "ok": ok})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", choices=RUNS, default="all", help="which runs to compare (default all)")
    parser.add_argument("--steps", type=int, default=50, help="steps of each run (default 50)")
    parser.add_argument("--worlds", default="1,2,4", help="numbers of ranks, comma-separated (default 1,2,4)")
    parser.add_argument("--golden", type=Path, help="write the curve of one process to this file and exit")
    parser.add_argument("--rank", nargs=2, metavar=("SHARDS", "FOLDER"), help="run as one rank (used internally)")
    args = parser.parse_args()
    if args.rank:
        rank(args.rank[0], Path(args.rank[1]), args.steps, args.runs)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = str(tiny_shards(folder))
        if args.golden:
            torch.set_num_threads(1)
            train(shards, folder / "one", args.steps, SingleProcessGroup(), settings=engine("single"))
            args.golden.write_text(json.dumps({"losses": losses(folder / "one")}, indent=1) + "\n")
            return
        rows = run(shards, folder, args.steps, [int(w) for w in args.worlds.split(",")], args.runs)
    print(
        "| W | engine | resumed with | settings | first 10 steps | 50 steps | averages |\n| - | - | - | - | - | - | - |"
    )
    for r in rows:
        one, off = r["run"], r["off"]
        shown = " | ".join(f"{off[n]:.1e}" if n in off else "" for n in LIMITS)
        shown += f" | {r['average']:.1e} |{'' if r['ok'] else ' ABOVE LIMIT'}"
        print(f"| {r['W']} | {one.first} | {one.then} | {' '.join(one.settings)} | {shown}")
    sys.exit(not all(r["ok"] for r in rows))


if __name__ == "__main__":
    main()
