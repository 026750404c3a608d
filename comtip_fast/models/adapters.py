"""Low-rank adapters (LoRA) of the image encoder, with the library peft.

peft replaces the selected linear layers. Checkpoints contain base weights and adapters. Exports contain their sum under the
names of a model without adapters, so that they need neither peft nor the settings.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from comtip_fast.config.vision import LoraConfig

BASE = ".base_layer"
"""Part of the name of the base weights of an adapted layer."""


def add_adapters(encoder: nn.Module, config: LoraConfig) -> None:
    """Add adapters to the blocks of an encoder, and freeze all its other parameters.

    Parameters
    ----------
    encoder
        Module with ``blocks``; changed in place.
    config
        Rank, scale and layers.

    Raises
    ------
    ValueError
        peft is not installed, or the blocks have none of the layers.
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
            f"vision.lora.layers={list(config.layers)}: the blocks of this encoder have none of these layers; choose among qkv, "
            "proj, fc1 and fc2, or set vision.lora.rank=0"
        ) from error


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of ``model`` with every adapter added to the weights of its layer; only adapted weights are copied."""
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
    """Return the name that a base weight has in a model without adapters; other names are returned unchanged."""
    return name.replace(BASE, "")


def _import() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"vision.lora.rank: adapters need the library peft, which cannot be imported ({error}); run pip install "
            "'comtip-fast[lora]', or set vision.lora.rank=0"
        ) from error
    module: ModuleType = peft
    return module
