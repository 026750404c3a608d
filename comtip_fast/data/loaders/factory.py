"""Selection of the loader by ``data.loader``."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from comtip_shards import ShardSet

from comtip_fast.config.schema import RunConfig
from comtip_fast.data.expression.training_tables import TrainingTables
from comtip_fast.data.loaders.base import BaseLoader
from comtip_fast.data.loaders.prepared import uses_own_process
from comtip_fast.data.loaders.stem_features import Stem
from comtip_fast.data.loaders.torch import TorchLoader
from comtip_fast.data.loaders.webdataset import WdsLoader

log = logging.getLogger("comtip_fast")
STEM_BYTES = 1 << 30
"""Largest size of a frozen stem's features that ``data.stem_features: auto`` keeps in memory."""


def make_loader(
    config: RunConfig,
    shards: ShardSet,
    tables: TrainingTables,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    frozen_stem: Stem | None = None,
) -> BaseLoader:
    """Return the loader that ``data.loader`` names; parameters as in :class:`comtip_fast.data.loaders.base.BaseLoader`.

    The loader gets ``frozen_stem`` only if ``data.stem_features`` keeps its features in memory; otherwise batches have tiles.

    Raises
    ------
    ValueError
        ``data.loader`` is ``dali`` and DALI is not installed, or ``rank`` is not from 0 to ``world - 1``.
    """
    device = torch.device(device)
    if frozen_stem is not None and not _kept_in_memory(frozen_stem, shards, tables, config):
        frozen_stem = None
    name = config.data.loader
    if name == "auto":
        name = "dali" if device.type == "cuda" and dali_is_installed() and frozen_stem is None else "torch"
    _log_choice(name, config, device, frozen_stem is not None)
    kwargs: dict[str, Any] = {"rank": rank, "world": world, "device": device}
    if name == "torch":
        return TorchLoader(shards, tables, config, frozen_stem, **kwargs)
    if name == "wds":
        return WdsLoader(shards, tables, config, frozen_stem, **kwargs)
    if not dali_is_installed():
        raise ValueError(
            "data.loader=dali: NVIDIA DALI is not installed; run pip install 'comtip-fast[dali-cu13]' "
            "(dali-cu12 for CUDA 12; both also decode on CPUs), or set data.loader=torch"
        )
    from comtip_fast.data.loaders.dali import DaliLoader

    return DaliLoader(shards, tables, config, frozen_stem, **kwargs)


def _log_choice(name: str, config: RunConfig, device: torch.device, has_features: bool) -> None:
    """Log which loader runs where; ``has_features`` says whether features of a frozen stem are kept in memory."""
    data = config.data
    own = name != "wds" and uses_own_process(data, device, name)
    if has_features:
        where = "reads tiles once, in the thread of the step; then batches are features of the frozen stem, from memory"
    elif data.workers == 0:
        where = "in the thread of the step"
    elif name == "wds":
        where = f"in {data.workers} processes"
    elif own and name == "dali" and device.type == "cuda":
        where = (
            f"on one thread of a process of its own, and {data.workers} threads of DALI in the training process "
            f"(data.loader_process={data.loader_process})"
        )
    else:
        of = "a process of its own" if own else "the training process"
        where = f"on {data.workers} threads of {of} (data.loader_process={data.loader_process})"
    log.info("loader: %s (data.loader=%s) %s", name, data.loader, where)


def _kept_in_memory(stem: Stem, shards: ShardSet, tables: TrainingTables, config: RunConfig) -> bool:
    """Return whether ``data.stem_features`` keeps the stem's features in memory; log why ``auto`` does not."""
    if config.data.stem_features != "auto":
        return config.data.stem_features == "memory"
    px = shards.manifest.tile.px
    values = stem(torch.zeros((1, 3, px, px), dtype=torch.uint8)).numel()
    n_bytes = torch.half.itemsize * values * config.data.views * tables.spots.size
    if n_bytes > STEM_BYTES:
        log.info(
            "frozen stem: the features of %d tiles in %d views need %d MiB, more than the %d MiB that data.stem_features=auto "
            "keeps in memory; the stem runs on every batch instead",
            tables.spots.size,
            config.data.views,
            -(-n_bytes // 2**20),
            STEM_BYTES >> 20,
        )
    return n_bytes <= STEM_BYTES


def dali_is_installed() -> bool:
    """Return whether DALI is installed, without importing it."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
