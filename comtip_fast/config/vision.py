"""Settings of the image encoder: its architecture, initial weights and low-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from comtip_fast.config.bounds import Count, CountOrZero, OpenShare, Positive, PositiveOrZero, Share


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Changes to the timm model that ``vision.backbone`` names; ``null`` keeps the value of the model."""

    patch_px: Count | None = None
    """Width and height of a patch in px."""
    width: Count | None = None
    """d, embedding width."""
    depth: Count | None = None
    """Number of transformer blocks."""
    heads: Count | None = None
    """Number of attention heads."""
    mlp_ratio: Positive | None = None
    """Hidden width of the MLP as a multiple of ``width``; for SwiGLU, the width of gate and value together."""
    mlp: Literal["mlp", "swiglu"] | None = None
    """``mlp``: two layers with GELU; ``swiglu``: gate and value in one layer, with SiLU (timm's ``SwiGLUPacked``)."""
    init_values: PositiveOrZero | None = None
    """Initial layer scale; 0 removes the layer scale."""
    registers: CountOrZero | None = None
    """Number of register tokens."""
    class_token: bool | None = None
    """Whether there is a class token. CoMTIP pools over patches in either case."""
    no_embed_class: bool | None = None
    """Whether class and register tokens have no position embedding."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation of the image encoder (extra ``lora``): its own weights are frozen; exports contain the merged weights."""

    rank: CountOrZero = 0
    """Rank of the adapters; 0 trains without adapters."""
    alpha: Positive = 16.0
    """Scale of an adapter: its output is multiplied by ``alpha / rank``."""
    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = ("qkv", "proj")
    """Linear layers of each block with an adapter: ``qkv`` and ``proj`` of attention, ``fc1`` and ``fc2`` of the MLP."""


Channels = tuple[float, float, float]
PositiveChannels = tuple[Positive, Positive, Positive]
Stage = Annotated[int, Field(ge=1, le=7)]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image encoder E and its masked branch."""

    backbone: Annotated[str, Field(min_length=1)] = "small"
    """``small``, or the name of a timm Vision Transformer (``vit_base_patch32_224``)."""
    pretrained: str = ""
    """Initial weights of a timm backbone: a ``.safetensors`` file, a PyTorch state dict (``.bin``, ``.pt``, ``.pth``; read as
    weights only), or ``hub`` to download through timm; empty for random weights."""
    vit: VitConfig = field(default_factory=VitConfig)
    """Architecture of a timm backbone where it differs from the named model."""
    pixel_mean: Channels | None = None
    """Mean of R, G and B (in 0 to 1) that is subtracted from tiles. ``null`` uses the mean in the ``config.json`` next to
    the file of ``pretrained``, timm's mean for ``hub``, and otherwise ImageNet's."""
    pixel_std: PositiveChannels | None = None
    """Standard deviation of R, G and B (of values in 0 to 1) by which tiles are divided; ``null``: as for ``pixel_mean``."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters of the encoder."""
    stem: Literal["pixels", "efficientnet_lite0"] = "pixels"
    """Patch embedding of ``small``: a linear map of the pixels, or frozen EfficientNet features."""
    stem_stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = (5, 7)
    """Stages, 1 to 7, of the frozen EfficientNet whose mean feature maps the encoder embeds. More stages describe colour and texture
    too, and take more memory (``data.stem_features``)."""
    patch_px: Count = 32
    """Width and height of a patch in px (``small`` only)."""
    width: Count = 192
    """d, embedding width of the image encoder (``small`` only)."""
    depth: Count = 3
    """Number of transformer blocks (``small`` only)."""
    heads: Count = 4
    """Number of attention heads of ``small`` and of the mask feature generator; must divide the encoder's width."""
    mask_ratio: OpenShare = 0.5
    """r, share of patches hidden from the masked branch; ``loss.mfm=0`` disables masking."""
    target: Literal["self", "ema"] = "self"
    """Source of the target features: the encoder itself (detached) or its exponential moving average."""
    ema_decay: Share = 0.996
    """Decay per step of the moving average (``target=ema``)."""
    distance: Literal["smooth_l1", "mse", "cosine"] = "smooth_l1"
    """Distance between predicted and target features."""
