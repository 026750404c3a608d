"""Walks of inference: validation, ``predict``, ``embed`` and ``evaluate``."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import sparse

from comtip_fast.data.expression.levels import LevelTable
from comtip_fast.export import Bundle
from comtip_fast.export_checks import ExportGene
from comtip_fast.inference import GeneQuery, Predictor
from comtip_fast.lineage import Lineage
from comtip_fast.training.validation import Validation
from testkit.rehearsal.cuda_runtime import stand_in_cuda
from testkit.rehearsal.evaluation import PARTS, evaluation, readout_of_task, section_facts
from testkit.rehearsal.launches import recorded_launches
from testkit.rehearsal.record import Record
from testkit.rehearsal.stand_in import CUDA
from testkit.rehearsal.walk import TILE_PX, Walk, group_of
from testkit.synthetic_task import SyntheticTask, gene_names

SPOTS, GENES = 512, 512
COHORT = "human_breast"


def infer(walk: Walk) -> Record:
    """Run a walk of ``validation``, ``predict``, ``embed`` or a part of :mod:`.evaluation`, and return its record."""
    record, config = Record(), walk.load()
    with stand_in_cuda(record) as mode, recorded_launches(mode), group_of(1) as group, torch.no_grad():
        with record.pause():
            task = SyntheticTask(config, group, TILE_PX, CUDA)
            task.model.eval()
            run = _validation(task) if walk.part == "validation" else _predictor(task, walk.part)
        run()
    return record


def _levels(n: int, Q: int) -> LevelTable:
    return LevelTable(np.full((n + 1, Q - 2), np.inf, np.float32), *np.zeros((3, n + 1, Q), np.float32))


def _tiles(n: int) -> np.ndarray:
    return np.zeros((n, 3, TILE_PX, TILE_PX), np.uint8)


def _predictor(task: SyntheticTask, part: str) -> Any:
    """Return a call of the predictor for ``SPOTS`` spots without stain statistics, or of evaluation."""
    names = gene_names(GENES if part in PARTS else task.sizes.n_identities)
    genes = [ExportGene(f"human:{symbol}", symbol, "", name, True, False) for symbol, name in names]
    levels = _levels(len(genes), task.sizes.n_levels)
    bundle = Bundle(task.config, task.sizes, task.model, levels, genes, [], 112.0, 0.5, task.tokenizer.sha256)
    if part in PARTS:
        readout = readout_of_task(task, [g.key for g in genes])
        bundle = replace(bundle, sections=section_facts(), readout=readout, lineage=Lineage(parents_known=True))
        return evaluation(Predictor(bundle, CUDA), part)
    predictor = Predictor(bundle, CUDA)
    asked = [GeneQuery(g.symbol, g.name, g.key) for g in genes[:GENES]]

    def run() -> None:
        features = predictor.image_features(_tiles(SPOTS), None)
        if part == "predict":
            predictor.predict(features, asked)

    return run


def _validation(task: SyntheticTask) -> Any:
    """Return a call of the validation on one section of ``SPOTS`` spots."""
    n = task.sizes.n_identities
    every = np.arange(n)
    shards: Any = SimpleNamespace(
        manifest=SimpleNamespace(sections=[SimpleNamespace(split="val", n_spots=SPOTS, first_spot=0)]),
        cohort_of_section=lambda _section: COHORT,
        measured=lambda _section: np.ones(n, bool),
    )
    choice = SimpleNamespace(ranked={COHORT: every}, trained=every)
    tables: Any = SimpleNamespace(genes=choice, table=_levels(n, task.sizes.n_levels))
    loader: Any = SimpleNamespace(
        counts=lambda s: (s, sparse.csr_matrix(np.ones((len(s), n), np.int32))),
        tiles=lambda s, _views: (s, torch.from_numpy(_tiles(len(s)))),
    )
    return Validation(task.model, shards, tables, loader, task.genes, task.config).score
