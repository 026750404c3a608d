"""``comtip bench step``: measure the speed, operations and memory of this project's training step and of others on one task.

The step in plain PyTorch computes the same loss as this project's step, which is checked before the measurement. The steps of other
methods have losses of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from comtip_shards import ShardSet

from comtip_fast.benchmarks.step.contender import Ours, StepContender
from comtip_fast.benchmarks.step.measure import Measured, measure
from comtip_fast.benchmarks.step.peers import Bleep, OpenClip, open_clip_is_installed
from comtip_fast.benchmarks.step.plain import Plain
from comtip_fast.config.io import load_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.runtime.devices import autocast, pick_device
from comtip_fast.training.engines.base import set_product_precision
from comtip_fast.training.task import CoMTIPTask, build_task

log = logging.getLogger("comtip_fast")
STEPS: dict[str, type[StepContender]] = {"ours": Ours, "plain": Plain, "open_clip": OpenClip, "bleep": Bleep}
TOLERANCE = 1e-4
"""Largest relative difference of the loss of ``ours`` and ``plain`` at one batch in fp32; 100 times as much in bf16."""


def config_of(path: Path, overrides: Sequence[str], shards: ShardSet, device: str) -> RunConfig:
    """Return the config at ``path``, changed for the benchmark on ``shards``.

    It uses pixels instead of a frozen stem, keeps levels in memory, draws the same number of genes in every step and logs no
    steps. Raises the errors of :func:`comtip_fast.config.io.load_config`.
    """
    config = load_config(path, [*overrides, f"train.device={device}"])
    return replace(
        config,
        data=replace(config.data, shards=str(shards.path), tile_px=None, tile_um=None, expression="table"),
        vision=replace(config.vision, stem="pixels"),
        panel=replace(config.panel, min_genes=config.panel.max_genes),
        train=replace(config.train, log_every=10**6),
    )


def benchmark_step(
    config: RunConfig, steps: Sequence[str], *, rounds: int, per_round: int, out: Path
) -> list[Measured]:
    """Measure the steps named in ``steps`` (keys of :data:`STEPS`) on the shard set of ``config``.

    ``ours`` is always measured, as the first. ``open_clip`` is left out, with a warning, if it is not installed.

    Raises
    ------
    ValueError, FileNotFoundError
        A name is unknown, there are fewer training spots than a batch has, the step in plain PyTorch does not implement a setting, or
        its loss differs from ours; or an error of :func:`comtip_fast.training.task.build_task`.
    """
    unknown = [name for name in steps if name not in STEPS]
    if unknown:
        raise ValueError(f"`steps` {', '.join(unknown)}: no such step; choose from {', '.join(STEPS)}")
    if "open_clip" in steps and not open_clip_is_installed():
        log.warning(
            "open_clip is not installed, so its step is left out; to measure it, run pip install 'comtip-fast[peers]'"
        )
        steps = [name for name in steps if name != "open_clip"]
    device = pick_device(config.train.device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    set_product_precision(config, device)
    task = build_task(config, device)
    if task.tables.spots.size < config.data.batch_size:
        raise ValueError(
            f"{config.data.shards}: {task.tables.spots.size} training spots, fewer than a batch of {config.data.batch_size}; give a "
            "larger set or a smaller data.batch_size"
        )
    log.info("%s", task.describe())
    with ExitStack() as stack:
        contenders: list[StepContender] = []
        for name in ("ours", *(n for n in steps if n != "ours")):
            contenders.append(STEPS[name](task))
            stack.callback(contenders[-1].close)
        for contender in contenders:
            if isinstance(contender, Plain):
                check_equal_loss(task, contender)
        return measure(contenders, rounds=rounds, steps=per_round, out=out)


def check_equal_loss(task: CoMTIPTask, plain: Plain) -> float:
    """Check that the task's step and the plain step compute the same loss for one batch and equal weights; return the relative difference.

    Raises
    ------
    ValueError
        The losses differ by more than rounding, so the steps do not compute the same.
    """
    batch = task.batch(task.batches(0)[0], 1, 0)
    task.model.train()
    with torch.no_grad(), autocast(task.config.train.precision, task.device):
        own = float(task.losses(task.model, batch)[0]["loss"])
        other = float(plain.loss(batch))
        in_bf16 = torch.is_autocast_enabled(task.device.type)
    difference = abs(own - other) / max(abs(own), 1e-12)
    log.info("loss of one batch: ours %.6f, plain %.6f, relative difference %.1e", own, other, difference)
    if not difference <= TOLERANCE * (100 if in_bf16 else 1):
        raise ValueError(
            f"comtip bench step: the plain step's loss is {other:.6f}, ours {own:.6f}, on the same batch and weights; with this "
            "config the steps are not comparable: leave plain out of `steps`, and report this difference"
        )
    return difference
