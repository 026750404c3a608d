"""Settings of the optimizer: learning rates, weight decay, gradient clipping, weight averaging and frozen parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from comtip_fast.config.bounds import Beta, CountOrZero, OpenShare, Positive, PositiveOrZero, Share

LayerDecay = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
SpikeFactor = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Pattern = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Learning rate and weight decay of one part of the model."""

    lr_scale: Positive = 1.0
    """Factor on the learning rate."""
    weight_decay: PositiveOrZero | None = None
    """Weight decay; ``null`` uses ``optim.weight_decay``."""


@dataclass(frozen=True, kw_only=True)
class VisionPartConfig:
    """Learning rate and weight decay of the image encoder."""

    lr_scale: Positive = 1.0
    """Factor on the learning rate."""
    weight_decay: PositiveOrZero | None = None
    """Weight decay; ``null`` uses ``optim.weight_decay``."""
    layer_decay: LayerDecay = 1.0
    """Factor on the learning rate from each block to the previous block (timm's layer decay); 1 disables it."""


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """Reaction to a spike: a step whose gradient norm exceeds a factor of the median norm of the last 64 steps."""

    policy: Literal["none", "skip", "clip"] = "none"
    """``none`` takes the step; ``skip`` leaves the weights unchanged and counts the step towards ``train.max_skips``; ``clip``
    clips the gradients to the limit (and to ``optim.clip``, if that is lower). With ``skip`` and ``clip``, spikes are counted,
    logged, and listed with their spots in ``spikes.jsonl``."""
    factor: SpikeFactor = 5.0
    """Factor on the median of the norms before clipping; applied once 20 norms are known."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: PositiveOrZero = 0.05
    """Decoupled weight decay; not applied to one-dimensional parameters (biases, norms, temperatures)."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """Coefficients of Adam's running averages."""
    warmup_steps: CountOrZero = 50
    """Steps of linear warm-up."""
    final_lr: Share = 0.02
    """Learning rate at the last step, as a share of ``optim.lr``."""
    clip: PositiveOrZero = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    """Reaction to spikes of the gradient norm."""
    ema: OpenShare | None = None
    """Decay per step of a moving average of the trained weights, e.g. 0.999; ``null`` keeps none. Validation, early stopping and
    the export then use the average instead of the weights of the last step. The average needs as much memory as the trained
    weights; with ZeRO 3, every rank averages its own shard. In step s, the decay is at most (1 + s) / (10 + s)."""
    vision: VisionPartConfig = field(default_factory=VisionPartConfig)
    """The image encoder (``vision.*``)."""
    text: PartConfig = field(default_factory=PartConfig)
    """The gene-sentence encoder (``genes.*``)."""
    heads: PartConfig = field(default_factory=PartConfig)
    """All other parameters: projections, pooling, pair head, temperatures and mask feature generator."""
    freeze: tuple[tuple[Pattern, CountOrZero], ...] = ()
    """Frozen parameters: pairs of the name of a module or parameter, which may contain ``*``, ``?`` and ``[...]``, and the last
    step for which it is frozen (0: all steps), e.g. ``[[vision, 500], ["vision.blocks.[0-5]", 0]]``. Frozen parameters have no
    optimizer state. With DeepSpeed, a run ends with exit code 75 when parameters thaw, and continues after a restart."""
