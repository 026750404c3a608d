"""Walks of ``comtip evaluate``: scores with their baselines, and the downstream tasks, on a synthetic shard set.

Tiles, counts and positions are synthetic arrays on the host; the code that uses them is the real one. All features copied from
the device are ones, so the scores are meaningless.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from comtip_shards.slides.tiles import StainStats
from scipy import sparse

from comtip_fast.evaluation.evaluate import evaluate
from comtip_fast.evaluation.tasks import TASKS
from comtip_fast.evaluation.tasks.context import TaskOptions
from comtip_fast.evaluation.tasks.run import run_tasks
from comtip_fast.evaluation.trained import METHODS
from comtip_fast.export_checks import ExportGene
from comtip_fast.inference import Predictor
from comtip_fast.models.readout.features import feature_width
from comtip_fast.models.readout.heads import CohortHead, NormHead, Readout
from comtip_fast.training.readout.fit import readout_settings
from testkit.synthetic_task import SyntheticTask, gene_names

SPOTS = 128
"""Number of spots of a section, one chunk of tiles."""
SECTIONS = (("t1", "donor_a", "train"), ("x1", "donor_b", "test"))
COHORT, PROGRAMMES = "human_breast", 8
PARTS = ("evaluate", "evaluate tasks")


class SyntheticShards:
    """The part of a shard set that evaluation reads: one section of split ``train`` and one of ``test``, of ``SPOTS`` spots each."""

    path = "synthetic"

    def __init__(self, genes: list[ExportGene], tile_px: int, tile_um: float, min_mpp: float) -> None:
        self.genes = genes
        facts = {"dataset": "synthetic", "species": "human", "tissue": "breast", "platform": ""}
        facts |= {"licence": "CC0", "attribution": ""}
        sections = [
            SimpleNamespace(section_id=s, donor=d, split=split, n_spots=SPOTS, source={}, **facts)
            for s, d, split in SECTIONS
        ]
        tile = SimpleNamespace(px=tile_px, um=tile_um, min_mpp=min_mpp)
        self.manifest = SimpleNamespace(tile=tile, sections=sections)
        n, side = SPOTS * len(SECTIONS), 8
        at = np.arange(n)
        self.spots = pd.DataFrame(
            {
                "section": at // SPOTS,
                "spot_id": at.astype(str),
                "x_px": 100.0 * (at % side),
                "y_px": 100.0 * (at % SPOTS // side),
                "label": np.where(at % SPOTS < SPOTS // 2, "left", "right"),
            }
        )
        rng = np.random.default_rng(0)
        self._counts = sparse.csr_matrix(rng.poisson(0.5, (n, len(genes))).astype(np.int32))
        self._tiles = rng.integers(0, 256, (tile_px, tile_px, 3), np.uint8)

    def cohort_of_section(self, _number: int) -> str:
        """Return the cohort of every section."""
        return COHORT

    def select(self, *, sections: list[int]) -> np.ndarray:
        """Return the spot indices of some sections."""
        return np.flatnonzero(np.isin(self.spots["section"].to_numpy(), sections))

    def tiles(self, spots: np.ndarray) -> np.ndarray:
        """Return the same tile for every spot."""
        return np.broadcast_to(self._tiles, (len(spots), *self._tiles.shape)).copy()

    def counts(self, spots: np.ndarray) -> sparse.csr_matrix:
        """Return the counts of some spots, which are random."""
        return self._counts[spots]

    def measured(self, _section: int) -> np.ndarray:
        """Return the mask of measured genes: all."""
        return np.ones(len(self.genes), bool)

    def stain(self, _section: int) -> StainStats:
        """Return the same statistics for every section."""
        return StainStats((0.4, 0.4, 0.4), (0.2, 0.2, 0.2))


def section_facts() -> list[dict[str, Any]]:
    """Return the sections as recorded in an export; the first one was trained on."""
    names = {"dataset": "synthetic", "species": "human", "tissue": "breast", "licence": "CC0", "attribution": ""}
    return [{"section_id": s, "donor": donor, "split": split, "n_spots": SPOTS} | names for s, donor, split in SECTIONS]


def readout_of_task(task: SyntheticTask, keys: list[str]) -> Readout:
    """Return a readout with the config's settings and arbitrary weights, whose head covers every second gene."""
    config, known = task.config, keys[::2]
    settings = readout_settings(config)
    width = feature_width(task.model, settings) * (1 + len(settings.radii))
    G = len(known)

    def head(block: str) -> NormHead:
        F = settings.columns(block, width).size
        return NormHead(np.ones((F, PROGRAMMES)), np.ones((PROGRAMMES, G)), np.zeros(G), np.ones(G))

    names = settings.block_names(width)
    blocks = {name: {norm: head(name) for norm in ("cp10k", "raw")} for name in names}
    mix = dict.fromkeys(("cp10k", "raw"), dict.fromkeys([*names, "levels"], 1 / (len(names) + 1)))
    return Readout(settings, [CohortHead(COHORT, known, np.zeros(width), np.ones(width), blocks, mix)])


def evaluation(predictor: Predictor, part: str) -> Callable[[], Any]:
    """Return a call of ``evaluate``, or of the downstream tasks without training, with one draw of each null and interval."""
    geometry = predictor.tile_px, predictor.tile_um, predictor.min_mpp
    shards: Any = SyntheticShards(predictor.bundle.genes, *geometry)
    if part == "evaluate":
        return lambda: evaluate(predictor, shards, n_null=1)
    names = [name for name, _ in gene_names(40)]
    options = TaskOptions(gene_sets={"first": names[:20], "second": names[20:40]}, n_bootstrap=1, n_null=1)
    scored = tuple(
        task for task in TASKS if task not in METHODS
    )  # the others train models in their own steps, which no walk covers
    return lambda: run_tasks(scored, predictor, shards, shards, options)
