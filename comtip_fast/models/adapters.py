"""Low-rank adapters (LoRA) of the image encoder, through the library peft.

The library replaces the chosen linear layers. Checkpoints hold base weights and adapters; exports hold their sum under the
names of a model without adapters, so that they need neither the library nor the settings.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from comtip_fast.config.vision import LoraConfig

BASE = ".base_layer"
"""Part of the name of an adapted layer's own weights."""


def add_adapters(encoder: nn.Module, config: LoraConfig) -> None:
    """Add adapters to the blocks of an encoder; all its other parameters are frozen.

    Parameters
    ----------
    encoder
        Has ``blocks``; changed in place.
    config
        Rank, scale and layers.

    Raises
    ------
    ValueError
        The library is not installed, or the blocks have none of the layers.
    """
    peft = _import()
    layers = "|".join(config.layers)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=rf"blocks\.\d+\.(.*\.)?({layers})",
        lora_dropout=0.0,
        bias="none",
    )
    try:
        peft.inject_adapter_in_model(settings, encoder)
    except ValueError as error:
        raise ValueError(
            f"vision.lora.layers={list(config.layers)}: the blocks of this encoder have none of them; choose others, or set "
            "vision.lora.rank=0"
        ) from error


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of ``model`` with every adapter added to the weights of its layer; copies only adapted weights."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, module in model.named_modules():
        if not hasattr(module, "base_layer") or not hasattr(module, "get_delta_weight"):
            continue
        layer: Any = module
        own = [key for key in state if key.startswith(f"{name}.")]
        for key, value in [(key, state.pop(key)) for key in own]:
            if key.startswith(f"{name}{BASE}."):
                state[plain_name(key)] = value
        for adapter in layer.active_adapters:
            state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight(adapter)
    return state


def plain_name(name: str) -> str:
    """Return the name of a weight in a model without adapters; an adapter's own weights keep theirs."""
    return name.replace(BASE, "")


def _import() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "vision.lora.rank: adapters need the library peft, which is not installed; pip install 'comtip-fast[lora]', or set "
            "vision.lora.rank=0"
        ) from error
    module: ModuleType = peft
    return module
