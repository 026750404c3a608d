"""Walks training steps of a config: the real trainer, engine, task, losses and model on stand-ins."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from comtip_shards.genes.identifiers import GeneResource
from torch.testing._internal.distributed.fake_pg import FakeStore

from comtip_fast.collectives import Group, SingleProcessGroup, share_of
from comtip_fast.config.io import load_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.data.batch import Batch
from comtip_fast.data.upload import PackedTensors
from comtip_fast.genes import GeneTokenizer
from comtip_fast.genes.tokens import gene_tokens
from comtip_fast.models import CoMTIP, ModelSizes
from comtip_fast.training.distributed.comm_timer import ClockedGroup
from comtip_fast.training.distributed.process_group import ProcessGroup
from comtip_fast.training.distributed.signals import Signals
from comtip_fast.training.engines.base import set_product_precision
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.losses import StepLosses
from comtip_fast.training.task import CoMTIPTask
from comtip_fast.training.trainer import Trainer
from testkit.rehearsal.cuda_runtime import stand_in_cuda
from testkit.rehearsal.engines import stand_in_engines
from testkit.rehearsal.launches import recorded_launches
from testkit.rehearsal.record import ROOT, Record
from testkit.rehearsal.stand_in import CUDA

SECTIONS = 64
TILE_PX = 224


@dataclass(frozen=True)
class Walk:
    """One walk: a config with overrides, on some ranks."""

    config: str
    """Name of a file in ``configs/``."""
    ranks: int = 1
    overrides: tuple[str, ...] = ()
    part: str = "step"
    """``step``, ``logged step``, or an entry of :mod:`.inference`."""

    def load(self) -> RunConfig:
        """Return the config, for a GPU."""
        return load_config(ROOT / "configs" / f"{self.config}.yaml", ["train.device=cuda", *self.overrides])

    @property
    def name(self) -> str:
        """The walk's key in the table."""
        words = [w.removeprefix("engine.") for w in self.overrides]
        return " ".join([self.part, *words])


@cache
def gene_names(n: int) -> list[tuple[str, str]]:
    """Return symbol and name of n protein-coding genes of the shipped table."""
    rows = [r for r in GeneResource.load().rows if r.kind == "protein"]
    return [(r.symbol, r.name) for r in (rows * (n // len(rows) + 1))[:n]]


class SyntheticLoader:
    """Synthetic batches at the config's sizes; the values are arbitrary."""

    def __init__(self, config: RunConfig, n_genes: int, tile_px: int, group: Group, features: tuple[int, int] | None):
        self.config, self.n_genes, self.tile_px, self.group, self.features = config, n_genes, tile_px, group, features

    def metrics(self) -> dict[str, float]:
        """Return the loader's counts."""
        return {"loader_wait_s": 0.0, "faults": 0}

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return eight global batches."""
        return [np.arange(self.config.data.batch_size)] * 8

    def batch(self, spots: np.ndarray, step: int, epoch: int) -> Batch:
        """Return this rank's share of a batch after its upload, as the loaders do (:meth:`BaseLoader._deliver`)."""
        own = share_of(len(spots), self.group.rank, self.group.size)
        b, G = own.stop - own.start, min(self.config.panel.max_genes, self.n_genes)
        index = torch.arange(own.start, own.stop)
        Q, S = self.config.levels.n_levels, self.tile_px
        tiles = torch.empty(b, 3, S, S, dtype=torch.uint8) if self.features is None else None
        features = None if self.features is None else torch.empty(b, *self.features)
        levels = ((index[:, None] * 7 + torch.arange(G) * 3) % Q).to(torch.uint8)
        panel = torch.arange(G, dtype=torch.int32) * (self.n_genes // G)
        section = (index % self.config.data.sections_per_batch).to(torch.int32)
        measured = torch.ones(b, G, dtype=torch.bool)
        batch = Batch(tiles, features, panel, levels, measured, section, index, step, panel_host=panel.numpy())
        return batch.with_tensors(PackedTensors.pack(batch.tensors(), CUDA).to(CUDA))


class SyntheticTask(CoMTIPTask):
    """The real task on a synthetic loader: no shard set is read."""

    def __init__(self, config: RunConfig, group: Group, tile_px: int) -> None:
        self.config, self.group, self.device = config, group, CUDA
        self.tokenizer = GeneTokenizer.load()
        n = max(config.genes.per_cohort, config.panel.max_genes)
        self.sizes = ModelSizes(
            tile_px=tile_px,
            n_levels=config.levels.n_levels,
            vocab_size=self.tokenizer.vocab_size,
            n_identities=n,
            longest=config.text.max_tokens + 2,
        )
        with torch.device(CUDA):
            self.model = CoMTIP(config, self.sizes)
        stem = self.model.vision.stem
        features = None if stem is None else (self.model.vision.n_patches, stem.width)
        loader: Any = SyntheticLoader(config, n, tile_px, group, features)
        self.loader = loader
        self.genes = gene_tokens(self.tokenizer, gene_names(n), np.arange(1, n + 1), config.text).to(CUDA)
        prior, strata = torch.zeros(n, config.levels.n_levels), torch.zeros(SECTIONS, n, dtype=torch.int64)
        self.step = StepLosses(config, self.genes, prior.to(CUDA), strata.to(CUDA), group)

    def fingerprint(self) -> dict[str, str]:
        """Return no hashes."""
        return {}


@contextmanager
def group_of(ranks: int) -> Iterator[Group]:
    """Yield the group of rank 0 of ``ranks``: the real one, on a backend whose collectives transfer nothing."""
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
    """Yield a trainer before its first step, inside the stand-in CUDA."""
    with (
        stand_in_cuda(record) as mode,
        recorded_launches(mode),
        stand_in_engines(mode),
        group_of(ranks) as inner,
    ):
        with record.pause():
            set_product_precision(config, CUDA)
            group = ClockedGroup(inner, CUDA)
            task = SyntheticTask(config, group, TILE_PX)
            trainer = Trainer(task, config, folder, group)
            trainer.engine = make_engine(task.module, config, group)
        yield trainer


def train(walk: Walk) -> Record:
    """Walk one training step after the first, and return its record; a ``logged step`` also makes a row of the log."""
    config, record = walk.load(), Record()
    with tempfile.TemporaryDirectory() as folder, trainer_of(config, walk.ranks, record, Path(folder)) as trainer:
        with record.pause():
            trainer.progress.step = 1
            if walk.ranks > 1:  # the ranks agree on the names of logged numbers in the first step
                trainer._one_step(Signals())
            else:
                _allocate(trainer)
        # The step after this number is logged or not.
        trainer.progress.step = config.train.log_every - 1 if walk.part == "logged step" else 1
        trainer._one_step(Signals())
    return record


def _allocate(trainer: Trainer) -> None:
    """Let the optimizer allocate its moments, as in the first step."""
    optimizer = trainer.engine.optimizer  # type: ignore[attr-defined]
    if trainer.config.engine.kind == "deepspeed":
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
