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
from comtip_fast.evaluation.trained.encoder import initial_weights
from comtip_fast.evaluation.trained.regression import RegressionTask
from comtip_fast.evaluation.trained.task import ExpressionTask
from comtip_fast.inference import Predictor
from comtip_fast.training.protocol import TrainingError
from comtip_fast.training.trainer import Trainer

log = logging.getLogger("comtip_fast")
RATES = (1.0, 0.1)
"""Learning rates to try, as factors of ``optim.lr``; without validation sections only the first is used."""
VALIDATIONS, PATIENCE = 40, 10
"""Largest number of validations, and number of validations without improvement before training stops."""
BUILD: dict[str, Callable[[TrainingData, RunConfig], ExpressionTask]] = {
    "finetune": lambda data, config: RegressionTask(data, config, pretrained=True),
    "supervised": lambda data, config: RegressionTask(data, config, pretrained=False),
    "bleep": BleepTask,
}

FROM_INITIAL = {"supervised", "bleep"}
"""Methods whose image encoder starts from the weights that pretraining started from."""


@dataclass
class TrainedMethod:
    """A method that was trained on the model's training sections, and predicts expression."""

    name: str
    task: ExpressionTask
    facts: dict[str, Any]
    """Entries in the results: budget, chosen settings and validation score."""

    @property
    def cohorts(self) -> set[str]:
        """Cohorts with training sections; others are not predicted."""
        return self.task.data.cohorts

    def predict(self, tiles: TileSource, stain: StainStats | None, cohort: str, keys: Sequence[str]) -> np.ndarray:
        """Predict log1p CP10K of a section, float64 (N, g); a gene that the method cannot predict in the cohort is NaN.

        It cannot predict genes that no training section measured and, if it averages training spots of the cohort, those that no
        training section of the cohort measured.

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
        learnt = zip(targets.keys, self.task.learnt(cohort).tolist(), strict=True)
        values, column = targets.expression(z), {k: i for i, (k, known) in enumerate(learnt) if known}
        out = np.full((len(values), len(keys)), np.nan)
        known = [j for j, k in enumerate(keys) if k in column]
        out[:, known] = values[:, [column[keys[j]] for j in known]]
        return out


def fit_methods(
    options: TrainOptions, predictor: Predictor, reference: TrainReference, keys: Sequence[str]
) -> list[TrainedMethod]:
    """Train methods on the training sections of a model; return them in the order of ``options.methods``.

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
        Options are wrong, the training sections or the loader cannot be used, or the weights that a method starts from are not in
        a local file or do not fit.
    FileNotFoundError
        The file of the weights that a method starts from does not exist.
    TrainingError
        A loss is not finite, or a signal stopped the training. If ``options`` has a folder, the same call then resumes it.
    """
    options.check()
    if not options.methods:
        return []
    if FROM_INITIAL & set(options.methods):
        initial_weights(predictor)  # before the slow work
    config = _config(predictor, reference, options)
    every = list(dict.fromkeys([*predictor.trained_genes, *sorted(keys)]))
    data = TrainingData(predictor, reference, every, config)
    if not data.validation:
        log.warning(
            "%s: no section of split 'val' in a trained cohort: methods are trained for all %d epochs with optim.lr, without early "
            "stopping",
            reference.shards.name,
            options.epochs,
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = _Checkpoints(options.folder or Path(temporary), kept=options.folder is not None)
        return [_fit(name, data, config, options.epochs, folder) for name in options.methods]


def _config(predictor: Predictor, reference: TrainReference, options: TrainOptions) -> RunConfig:
    """Return the run's config with the settings of its own training replaced by those of the methods."""
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
        data=replace(config.data, shards=tuple(map(str, reference.shards.paths))),
        optim=replace(config.optim, freeze=()),
        train=train,
        engine=EngineConfig(kind="single"),
        watch=WatchConfig(),
    )


@dataclass(frozen=True)
class _Checkpoints:
    """Folder of the checkpoints of all methods."""

    path: Path
    kept: bool
    """False for a temporary folder, from which a later call cannot resume."""


@dataclass
class _Candidate:
    """A task after one training, or with the weights that training starts from."""

    task: ExpressionTask
    score: float
    """Validation score; minus infinity if there is none."""
    lr: float | None
    """Learning rate; None for the weights that training starts from."""
    facts: dict[str, Any]


def _fit(name: str, data: TrainingData, config: RunConfig, epochs: int, folder: _Checkpoints) -> TrainedMethod:
    """Train a method with each learning rate, and return the one with the best validation score.

    Without validation sections, only the first learning rate is used. The weights that ``finetune`` starts from are
    a candidate too.
    """
    steps = epochs * len(data.loader.batches(0))
    rates = [config.optim.lr * factor for factor in (RATES if data.validation else RATES[:1])]
    candidates = [_train(name, data, _at_rate(config, name, rate, steps, data), epochs, folder) for rate in rates]
    if data.validation and name == "finetune":  # its first weights, the linear probe, may be the best ones
        task = BUILD[name](data, config)
        score, _, _ = task.validation_result([task.validation_share(lambda what: None)])
        candidates.append(_Candidate(task, score, None, {"steps": 0, "best_step": 0, "stopped": ""}))
    best = max(candidates, key=lambda c: c.score if np.isfinite(c.score) else -np.inf)
    setting = best.task.choose_by_validation() if data.validation else ""
    facts = {
        "epochs": epochs,
        "steps_budget": steps,
        "lr": best.lr,
        **best.facts,
        "setting": setting,
        "validation_pcc": best.score if data.validation else None,
        "validation_pcc_by_lr": {f"{c.lr:g}": c.score for c in candidates if c.lr is not None and data.validation},
        "trained_on": data.section_ids,
        "stopped_on": [v.section_id for v in data.validation],
        "seed": config.train.seed,
    }
    return TrainedMethod(name, best.task, facts)


def _at_rate(config: RunConfig, name: str, rate: float, steps: int, data: TrainingData) -> RunConfig:
    """Return the config of one training with learning rate ``rate``, ``steps`` steps, and a schedule of validations."""
    every = max(1, steps // VALIDATIONS) if data.validation else 0
    warmup = min(config.optim.warmup_steps, steps // 10)
    checkpoint_every = every or max(1, steps // 10)
    return replace(
        config,
        name=LABELS[name],
        optim=replace(config.optim, lr=rate, warmup_steps=warmup),
        train=replace(config.train, steps=steps, validate_every=every, checkpoint_every=checkpoint_every),
    )


def _train(name: str, data: TrainingData, config: RunConfig, epochs: int, folder: _Checkpoints) -> _Candidate:
    """Train a method, or continue from its checkpoints in ``folder``."""
    task = BUILD[name](data, config)
    what = LABELS[name]
    initial = data.predictor.bundle.initial_weights if name in FROM_INITIAL else ""
    run_dir = folder.path / f"{name}-{_digest(task, config, epochs, initial)}"
    log.info("%s: training at most %d steps with learning rate %g", what, config.train.steps, config.optim.lr)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)  # of dropout; a checkpoint holds its state
        fitted = Trainer(task, config, run_dir).fit(resume=True)
    if fitted.stopped == "sigterm":
        again = (
            "its checkpoint is written; run the same command to continue"
            if folder.kept
            else "its checkpoint was temporary; give `out` to keep checkpoints, and start again"
        )
        raise TrainingError(f"{what}: stopped by a signal; {again}")
    facts = {"steps": fitted.step, "best_step": fitted.best_step, "stopped": fitted.stopped}
    return _Candidate(task, fitted.best_score, config.optim.lr, facts)


def _digest(task: ExpressionTask, config: RunConfig, epochs: int, initial: str) -> str:
    """Return a hash of data, model, targets, epochs, learning rate, seed and initial weights, to name the checkpoint folder."""
    parts = task.fingerprint() | {"epochs": epochs, "lr": config.optim.lr, "seed": config.train.seed}
    if initial:
        parts |= {"initial_weights": initial}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]
