"""Selection of the engine by ``engine.kind``, and the check of its requirements."""

from __future__ import annotations

import torch
from torch import nn

from comtip_fast.collectives import Group
from comtip_fast.config.schema import RunConfig
from comtip_fast.training.engines.base import Engine
from comtip_fast.training.engines.torch import TorchEngine
from comtip_fast.training.protocol import TrainingError


def check_engine(config: RunConfig, device: torch.device) -> None:
    """If the config selects DeepSpeed, check before any slow work that this machine has what DeepSpeed needs.

    Raises
    ------
    TrainingError
        A requirement is missing; the message names the requirement.
    """
    if config.engine.kind == "deepspeed":
        from comtip_fast.training.engines.deepspeed import check_deepspeed

        check_deepspeed(config, device)


def make_engine(module: nn.Module, config: RunConfig, group: Group) -> Engine:
    """Return the engine that the config selects; ``module`` must already hold the initial weights.

    Raises
    ------
    TrainingError
        ``engine.kind`` is ``single`` but there are several processes, or it is ``deepspeed`` and DeepSpeed cannot be imported.
    """
    kind = config.engine.kind
    if kind == "single" and group.size > 1:
        raise TrainingError(
            f"engine.kind=single, but {group.size} processes were launched; set engine.kind to auto, ddp or deepspeed"
        )
    if kind == "deepspeed":
        from comtip_fast.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, config, group)
    return TorchEngine(module, config, group)
