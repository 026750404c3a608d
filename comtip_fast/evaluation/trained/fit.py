"""Train the methods: learning rate, number of steps and further settings are chosen on the validation sections."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comtip_shards.slides.tiles import StainStats

from comtip_fast.config.schema import EngineConfig, RunConfig, WatchConfig
from comtip_fast.data.tile_sources import TileSource
from comtip_fast.evaluation.train_reference import TrainReference
from comtip_fast.evaluation.trained import LABELS, TrainOptions
from comtip_fast.evaluation.trained.bleep import BleepTask
from comtip_fast.evaluation.trained.data import TrainingData
from comtip_fast.evaluation.trained.regression import RegressionTask
from comtip_fast.evaluation.trained.task import ExpressionTask
from comtip_fast.inference import Predictor
from comtip_fast.training.protocol import TrainingError
from comtip_fast.training.trainer import Trainer

log = logging.getLogger("comtip_fast")
RATES = (1.0, 0.1)
"""Learning rates to try, as factors of ``optim.lr``; without validation sections the first is used."""
VALIDATIONS, PATIENCE = 40, 10
"""Largest number of validations, and validations without improvement before training stops."""
BUILD: dict[str, Callable[[TrainingData, RunConfig], ExpressionTask]] = {
    "finetune": lambda data, config: RegressionTask(data, config, pretrained=True),
    "supervised": lambda data, config: RegressionTask(data, config, pretrained=False),
    "bleep": BleepTask,
}


@dataclass
class TrainedMethod:
    """A trained method."""

    name: str
    task: ExpressionTask
    facts: dict[str, Any]
    """What the results record: budget, chosen settings and validation score."""

    @property
    def cohorts(self) -> set[str]:
        """Cohorts with training sections; others are not predicted."""
        return self.task.data.cohorts

    def predict(self, tiles: TileSource, stain: StainStats | None, cohort: str, keys: Sequence[str]) -> np.ndarray:
        """Predict log1p CP10K of a section, float64 (N, g); a gene that was not trained is constant 0.

        Parameters
        ----------
        tiles, stain
            Tiles of the N spots, read in chunks, and the stain statistics of the section.
        cohort
            One of :attr:`cohorts`.
        keys
            Keys of the g genes.
        """
        targets = self.task.data.targets
        (z,) = self.task.predict_tiles(tiles, stain, cohort).values()
        values, column = targets.expression(z), {k: i for i, k in enumerate(targets.keys)}
        out = np.zeros((len(values), len(keys)))
        known = [j for j, k in enumerate(keys) if k in column]
        out[:, known] = values[:, [column[keys[j]] for j in known]]
        return out


def fit_methods(
    options: TrainOptions, predictor: Predictor, reference: TrainReference, keys: Sequence[str]
) -> list[TrainedMethod]:
    """Train methods on the training sections of a model.

    Parameters
    ----------
    options
        Methods, epochs, folder and seed.
    predictor, reference
        The model and its training sections.
    keys
        Genes to predict, in addition to the model's trained genes.

    Raises
    ------
    ValueError
        Options are wrong, or the training sections cannot be used.
    TrainingError
        A loss is not finite, or a signal stopped the training; the same command continues it.
    """
    options.check()
    if not options.methods:
        return []
    config = _config(predictor, reference, options)
    every = list(dict.fromkeys([*predictor.trained_genes, *sorted(keys)]))
    data = TrainingData(predictor, reference, every, config)
    if not data.validation:
        log.warning(
            "%s: no section of split 'val' in a trained cohort: methods are trained for all %d epochs with optim.lr, without early "
            "stopping",
            reference.shards.path,
            options.epochs,
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        return [_fit(name, data, config, options.epochs, folder) for name in options.methods]


def _config(predictor: Predictor, reference: TrainReference, options: TrainOptions) -> RunConfig:
    """Return the config of the run with what concerns its own training replaced."""
    config = predictor.config
    train = replace(
        config.train,
        seed=options.seed,
        start_from="",
        wandb="",
        tensorboard=False,
        keep_checkpoints=1,
        patience=PATIENCE,
        device="auto",
    )
    return replace(
        config,
        data=replace(config.data, shards=str(reference.shards.path)),
        optim=replace(config.optim, freeze=()),
        train=train,
        engine=EngineConfig(kind="single"),
        watch=WatchConfig(),
    )


def _fit(name: str, data: TrainingData, config: RunConfig, epochs: int, folder: Path) -> TrainedMethod:
    """Train a method with every learning rate, and return the one with the best validation score."""
    steps = epochs * len(data.loader.batches(0))
    every = max(1, steps // VALIDATIONS) if data.validation else 0
    best: tuple[float, ExpressionTask, dict[str, Any]] | None = None
    tried: dict[str, float | None] = {}
    if data.validation and name == "finetune":  # its first weights, the linear probe, may be the best ones
        first = BUILD[name](data, config)
        score, _, _ = first.validation_result([first.validation_share(lambda what: None)])
        if np.isfinite(score):
            best = (score, first, {"lr": None, "steps": 0, "best_step": 0, "stopped": ""})
    for factor in RATES if data.validation else RATES[:1]:
        rate = config.optim.lr * factor
        own = replace(
            config,
            name=LABELS[name],
            optim=replace(config.optim, lr=rate, warmup_steps=min(config.optim.warmup_steps, steps // 10)),
            train=replace(
                config.train, steps=steps, validate_every=every, checkpoint_every=every or max(1, steps // 10)
            ),
        )
        task = BUILD[name](data, own)
        log.info("%s: training at most %d steps (%d epochs) with learning rate %g", LABELS[name], steps, epochs, rate)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own.train.seed)  # of dropout; a checkpoint holds its state
            fitted = Trainer(task, own, folder / f"{name}-{_digest(task, own, epochs)}").fit(resume=True)
        if fitted.stopped == "sigterm":
            raise TrainingError(
                f"{LABELS[name]}: stopped by a signal; its checkpoint is written, run the same command again to continue"
            )
        tried[f"{rate:g}"] = fitted.best_score if data.validation else None
        if best is None or fitted.best_score > best[0]:
            facts = {"lr": rate, "steps": fitted.step, "best_step": fitted.best_step, "stopped": fitted.stopped}
            best = (fitted.best_score, task, facts)
    assert best is not None
    setting = best[1].choose_by_validation() if data.validation else ""
    facts = {
        "epochs": epochs,
        "steps_budget": steps,
        **best[2],
        "setting": setting,
        "validation_pcc": best[0] if data.validation else None,
        "validation_pcc_by_lr": tried,
        "trained_on": data.section_ids,
        "stopped_on": [v.section_id for v in data.validation],
        "seed": config.train.seed,
    }
    return TrainedMethod(name, best[1], facts)


def _digest(task: ExpressionTask, config: RunConfig, epochs: int) -> str:
    """Return a name of the training, so that another one never continues from its checkpoints."""
    parts = task.fingerprint() | {"epochs": epochs, "lr": config.optim.lr, "seed": config.train.seed}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]
