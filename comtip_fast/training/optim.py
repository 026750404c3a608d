"""AdamW with linear warm-up and cosine decay; the learning rate is a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from comtip_fast.config.schema import OptimConfig


def make_optimizer(module: nn.Module, config: OptimConfig, *, fused: bool = False) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; weight decay applies to tensors of two or more dimensions.

    Parameters
    ----------
    module
        The trained module.
    config
        Rate, decay and betas.
    fused
        Update all parameters in a few kernels, which can also skip the update (:func:`mask_steps`). Results differ from
        the other implementation in the last bits, so runs on a CPU, whose curves are compared bit for bit, do not use it.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True if fused else None)


def mask_steps(optimizer: torch.optim.Optimizer, good: torch.Tensor) -> None:
    """Make later steps of a fused optimizer skip the update if ``good`` is False, without a read on the host.

    Parameters
    ----------
    optimizer
        A fused AdamW.
    good
        bool scalar on the device of the parameters.
    """
    # The attribute of torch.amp.GradScaler: the kernels skip the update where it is 1, and its step is not counted.
    optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Return the learning rate of optimizer step ``step`` (counted from 1) of ``total``; the last is ``lr * final_lr``."""
    if step <= config.warmup_steps:
        return config.lr * step / max(1, config.warmup_steps)
    share = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer state as CPU tensors named ``<parameter>/<entry>``, which can be saved without pickle."""
    out: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            out[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return out


def restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Load the state that :func:`optimizer_tensors` returned."""
    parameters = dict(module.named_parameters())
    for full, value in tensors.items():
        name, key = full.rsplit("/", 1)
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU, unless it is fused, and its moments on the parameter's device.
        on_cpu = key == "step" and not optimizer.defaults.get("fused")
        optimizer.state[parameter][key] = value if on_cpu else value.to(parameter.device)
