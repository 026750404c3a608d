"""Walks of training steps of a config: the real trainer, engine, task, losses and model run on stand-ins."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from comtip_fast.collectives import Group, SingleProcessGroup
from comtip_fast.config.io import load_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.training.distributed.comm_timer import ClockedGroup
from comtip_fast.training.distributed.process_group import ProcessGroup
from comtip_fast.training.distributed.signals import Signals
from comtip_fast.training.engines.base import set_product_precision
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.trainer import Trainer
from testkit.rehearsal.costs import count_saved
from testkit.rehearsal.cuda_runtime import stand_in_cuda
from testkit.rehearsal.engines import stand_in_engines
from testkit.rehearsal.graphs import GraphRules, next_step, of_trainer
from testkit.rehearsal.launches import recorded_launches
from testkit.rehearsal.record import ROOT, Record
from testkit.rehearsal.stand_in import CUDA
from testkit.synthetic_task import SyntheticTask

TILE_PX = 224


@dataclass(frozen=True)
class Walk:
    """Description of one walk: a config with overrides, on rank 0 of some ranks."""

    config: str
    """Name of a file in ``configs/``, without its suffix."""
    ranks: int = 1
    """Number of ranks."""
    overrides: tuple[str, ...] = ()
    """``KEY=VALUE`` overrides of the config."""
    part: str = "step"
    """``step``, ``logged step``, or a part that :func:`.inference.infer` runs."""

    def load(self) -> RunConfig:
        """Return the config for a GPU, without compilation, because Inductor needs tensors with storage."""
        overrides = ["train.device=cuda", "engine.compile=false", *self.overrides]
        return load_config(ROOT / "configs" / f"{self.config}.yaml", overrides)

    @property
    def judged(self) -> bool:
        """Whether the rules of CUDA graphs are applied: to a step in one piece of each config and engine, padded or not."""
        in_one_piece = ("engine.kind", "engine.zero_stage", "engine.panel_sizes")
        return self.part == "step" and all(o.startswith(in_one_piece) for o in self.overrides)

    @property
    def name(self) -> str:
        """Name of the walk in the table."""
        words = [w.removeprefix("engine.") for w in self.overrides]
        return " ".join([self.part, *words])


@contextmanager
def group_of(ranks: int) -> Iterator[Group]:
    """Yield the process group of rank 0 of ``ranks`` ranks, on a backend whose collectives transfer nothing."""
    if ranks == 1:
        yield SingleProcessGroup()
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield ProcessGroup()
    finally:
        dist.destroy_process_group()


@contextmanager
def trainer_of(config: RunConfig, ranks: int, record: Record, folder: Path) -> Iterator[Trainer]:
    """Yield a trainer before its first step, with CUDA, kernel launches and engines replaced by stand-ins."""
    with (
        stand_in_cuda(record) as mode,
        recorded_launches(mode),
        stand_in_engines(mode),
        group_of(ranks) as inner,
    ):
        with record.pause():
            set_product_precision(config, CUDA)
            group = ClockedGroup(inner, CUDA)
            task = SyntheticTask(config, group, TILE_PX, CUDA)
            trainer = Trainer(task, config, folder, group)
            trainer.engine = make_engine(task.module, config, group)
        yield trainer


def train(walk: Walk, *, graph_rules: bool = False) -> Record:
    """Run a walk of one training step after the first, and return its record; a ``logged step`` also writes a row of the log.

    With ``graph_rules``, the step is compared with the next one by the rules of CUDA graphs (:mod:`.graphs`).
    """
    config, record = walk.load(), Record()
    with tempfile.TemporaryDirectory() as folder, trainer_of(config, walk.ranks, record, Path(folder)) as trainer:
        with record.pause():
            trainer.progress.step = 1
            if walk.ranks > 1:  # the ranks agree on the names of logged numbers in the first step
                trainer._one_step(Signals())
            else:
                allocate(trainer)
        # The step after this number is logged or not.
        trainer.progress.step = config.train.log_every - 1 if walk.part == "logged step" else 1
        rules = GraphRules(record)
        with count_saved(record), of_trainer(trainer, rules) if graph_rules else nullcontext():
            trainer._one_step(Signals())
        if graph_rules:
            record.graph_rules = next_step(trainer, rules)
    return record


def allocate(trainer: Trainer) -> None:
    """Let the optimizer allocate its moments, as in the first step; DeepSpeed's stand-in has none."""
    optimizer = trainer.engine.optimizer  # type: ignore[attr-defined]
    if trainer.config.engine.kind == "deepspeed":
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
