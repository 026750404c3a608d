"""Optimizer (AdamW) and learning-rate schedule: linear warm-up and cosine decay, a pure function of the step."""

from __future__ import annotations

import math

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from comtip_fast.config.optim import OptimConfig, PartConfig, VisionPartConfig
from comtip_fast.training.freezing import last_frozen_steps
from comtip_fast.training.masked_adamw import MaskedAdamW
from comtip_fast.training.protocol import MOMENTS, PartSource


def make_optimizer(
    module: nn.Module, config: OptimConfig, *, fused: bool = False, masked: bool = False
) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; weight decay applies to tensors of two or more dimensions.

    Parameters with the same weight decay, learning-rate factor and last frozen step form a group; tensors to which weight decay
    does not apply are in separate groups. A group holds its learning-rate factor as ``lr_scale``.

    Parameters
    ----------
    module
        The trained module.
    config
        Settings of the optimizer (``optim``).
    fused
        Whether to use PyTorch's fused implementation: a few kernels update all parameters, and can also skip the update
        (:func:`mask_steps`). Its results differ from those of the default implementation in the last bits. Runs on a CPU do
        not use it, because their loss curves must be bit-identical.
    masked
        Whether to return :class:`.masked_adamw.MaskedAdamW`, which has the same results as ``fused`` and needs less time on the host.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    scales = layer_scales(module, config.vision.layer_decay)
    # Parameters that thaw later are groups of their own: ZeRO counts the steps of a group, not of a parameter.
    until = last_frozen_steps([name for name, _ in named], config.freeze)
    groups: dict[tuple[bool, float, float, int], list[nn.Parameter]] = {}
    for name, parameter in named:
        part = part_of(name, config)
        decay = config.weight_decay if part.weight_decay is None else part.weight_decay
        decayed = parameter.ndim >= 2
        key = (not decayed, decay if decayed else 0.0, part.lr_scale * scales.get(name, 1.0), until.get(name, 0))
        groups.setdefault(key, []).append(parameter)
    settings = [
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        for (_, decay, scale, _), params in sorted(groups.items(), key=lambda item: item[0][0])
    ]
    if masked:
        return MaskedAdamW(settings, config.lr, config.betas)
    return torch.optim.AdamW(settings, lr=config.lr, betas=config.betas, fused=True if fused else None)


def part_of(name: str, config: OptimConfig) -> PartConfig | VisionPartConfig:
    """Return the optimizer settings of the part of the model that the parameter ``name`` belongs to."""
    parts: dict[str, PartConfig | VisionPartConfig] = {"vision": config.vision, "genes": config.text}
    return parts.get(name.split(".", maxsplit=1)[0], config.heads)


def layer_scales(module: nn.Module, decay: float) -> dict[str, float]:
    """Return the learning-rate factor (timm's layer decay) of each trainable parameter of ``module.vision``, by name in ``module``.

    The dict is empty for a decay of 1 and for a module without ``vision``.
    """
    vision = getattr(module, "vision", None)
    if decay == 1 or vision is None:
        return {}
    groups = param_groups_layer_decay(vision, layer_decay=decay)
    scale_of = {id(p): float(g["lr_scale"]) for g in groups for p in g["params"]}
    return {f"vision.{name}": scale_of[id(p)] for name, p in vision.named_parameters() if id(p) in scale_of}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group: the rate of the step times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def mask_steps(optimizer: torch.optim.Optimizer, good: torch.Tensor) -> None:
    """Make the next step of a fused optimizer skip the update if ``good`` is False, without a read on the host.

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
    """Return the learning rate of step ``step`` (from 1) of ``total``: warm-up to ``lr``, then a cosine to ``lr * final_lr``."""
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
            stored = torch.as_tensor(value).detach().cpu().contiguous()
            # Parameters may share a step counter, and a file of tensors stores each of them.
            out[f"{name}/{key}"] = stored.clone() if key == "step" else stored
    return out


def restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, source: PartSource) -> None:
    """Load the state of the trained parameters, which :func:`optimizer_tensors` returned; a parameter without state keeps its own."""
    counters: dict[float, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:  # also those that a change of optim.freeze has frozen
            continue
        state = {key: source.read(name, key, 0, parameter.numel()) for key in MOMENTS}
        moments = {key: t.reshape(parameter.shape).to(parameter.device) for key, t in state.items() if t is not None}
        if not moments:
            continue
        step = torch.tensor(source.step_of(name))
        # AdamW keeps its step counter on the CPU, unless it is fused.
        if isinstance(optimizer, MaskedAdamW):
            step = counters.setdefault(float(step), step.to(parameter.device))
        elif optimizer.defaults.get("fused"):
            step = step.to(parameter.device)
        optimizer.state[parameter].update(step=step, **moments)
    if isinstance(optimizer, MaskedAdamW):
        optimizer.forget()
