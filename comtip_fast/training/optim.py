"""AdamW with warm-up and cosine; the learning rate is a function of the step and nothing else."""

from __future__ import annotations

import math

import torch
from torch import nn

from comtip_fast.config.schema import OptimConfig


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; vectors and scalars are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Return the rate of optimizer step ``step`` (1 is the first) of ``total``: linear warm-up, then cosine.

    The last step gets ``lr * final_lr``.
    """
    if step <= config.warmup_steps:
        return config.lr * step / max(1, config.warmup_steps)
    share = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as tensors named ``<parameter>/<entry>``, so that it needs no pickle."""
    out: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            out[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return out


def restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave."""
    parameters = dict(module.named_parameters())
    for full, value in tensors.items():
        name, key = full.rsplit("/", 1)
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU and its moments beside the parameter.
        optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
