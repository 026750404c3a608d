"""Pretraining from a config file: :func:`pretrain`, which ``comtip pretrain`` calls on every rank."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from comtip_shards.storage.atomic import write_atomic

from comtip_fast.config.io import load_config
from comtip_fast.lineage import FILE
from comtip_fast.plan.live import step_cost
from comtip_fast.runtime.devices import pick_device
from comtip_fast.runtime.torch_internals import untested
from comtip_fast.training.checkpoint.resume import CHECKPOINTS, first_sets_of, refuse_second_run
from comtip_fast.training.checkpoint.store import steps_of
from comtip_fast.training.distributed.comm_timer import ClockedGroup
from comtip_fast.training.distributed.process_group import init_distributed, on_rank_zero
from comtip_fast.training.engines.base import set_product_precision
from comtip_fast.training.engines.factory import check_engine
from comtip_fast.training.task import CoMTIPTask, build_task
from comtip_fast.training.trainer import FitResult, Trainer
from comtip_fast.training.warm_start import parents_of

log = logging.getLogger("comtip_fast")


def pretrain(
    config: Path | str | None,
    out: Path | str,
    *,
    overrides: Sequence[str] = (),
    start_from: Path | str | None = None,
    resume: bool = False,
    device: str = "auto",
) -> FitResult:
    """Train a model and export the weights with the best validation score, or the last weights if no validation had a score.

    A run that a signal stops writes a checkpoint, but no export.

    Parameters
    ----------
    config
        A YAML file (docs/settings.md lists every key); ``None`` starts from the defaults.
    out
        Folder of the run; created if missing.
    overrides
        ``key=value`` settings that take precedence over the file, e.g. ``"train.steps=500"``.
    start_from
        An export or finished run whose weights initialize the tensors of equal name and shape
        (:func:`comtip_fast.training.warm_start.start_from`).
    resume
        Continue from the newest valid checkpoint in ``out``, or start from step 0 if the folder has no checkpoint. By default, a
        folder that holds a run is refused. ``data.shards`` may have further sets after those of the checkpoint.
    device
        ``cpu`` or ``cuda``, which replaces ``train.device`` of the config; ``auto`` keeps the value of the config, by default
        a GPU if there is one.

    Returns
    -------
    FitResult
        Last step, best step and its validation score, and why training stopped.

    Raises
    ------
    ValueError, FileNotFoundError
        The config, device, shard set, initial weights or run folder cannot be used, a record is damaged, or training stopped at
        non-finite steps or after too many skipped updates.
    comtip_fast.training.distributed.failures.RestartError
        A rank was lost or late, a disk is full or fails, or parameters thaw under DeepSpeed; once the cause of a failure is removed,
        a new process can continue with ``resume``.

    Examples
    --------
    >>> import comtip_fast
    >>> result = comtip_fast.pretrain("tiny.yaml", "run", overrides=["train.steps=20"], device="cpu")
    >>> result.step, result.stopped
    (20, 'steps')
    """
    out = Path(out)
    settings = list(overrides)
    if start_from is not None:
        settings.append(f"train.start_from={json.dumps(str(start_from))}")
    if device != "auto":
        settings.append(f"train.device={device}")
    run = load_config(config, settings)
    refuse_second_run(out, resume)
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    target = pick_device(run.train.device)
    check_engine(run, target)
    set_product_precision(run, target)
    with init_distributed(run.engine.timeout_s, run.train.device, wait_timeout_s=run.engine.wait_timeout_s) as ranks:
        group = ClockedGroup(ranks, target)
        if group.rank > 0:
            log.setLevel(logging.WARNING)
        elif (warning := untested()) is not None:
            log.warning("%s", warning)
        # A checkpoint holds all weights; the file of initial weights may no longer exist.
        fresh = not (resume and steps_of(out / CHECKPOINTS))
        parents = parents_of(run, None if fresh else out, required=fresh)
        first = () if fresh else on_rank_zero(lambda: first_sets_of(out), group)
        task = build_task(run, target, group, initialise=fresh, parents=parents, first_sets=first)
        log.info("%s", task.describe())
        if group.rank == 0:
            _record_parents(task, out)
        cost = step_cost(
            run, task.model, tile_px=task.sizes.tile_px, trained_genes=task.sizes.n_identities, ranks=group.size
        )
        return Trainer(task, run, out, group, cost=cost).fit(resume=resume)


def _record_parents(task: CoMTIPTask, out: Path) -> None:
    """Log warnings of leakage, and write the lineage of the run's parents (if it has any), which may be moved before a resume."""
    for message in task.leaks():
        log.warning("%s", message)
    if task.parents.runs or not task.parents.parents_known:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / FILE, task.parents.to_json())
