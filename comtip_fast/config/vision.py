"""Settings of the image encoder: its architecture, initial weights and low-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from comtip_fast.config.bounds import Count, CountOrZero, OpenShare, Positive, PositiveOrZero, Share


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Differences of a timm backbone from the model that ``vision.backbone`` names; ``null`` keeps the model's own value."""

    patch_px: Count | None = None
    """Side of a patch in pixels."""
    width: Count | None = None
    """d, embedding width."""
    depth: Count | None = None
    """Transformer blocks."""
    heads: Count | None = None
    """Attention heads."""
    mlp_ratio: Positive | None = None
    """Hidden width of the MLP as a multiple of ``width``; for SwiGLU, of gate and value together."""
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
    """Low-rank adaptation of the image encoder (extra ``lora``); its own weights are then frozen, and exports are merged."""

    rank: CountOrZero = 0
    """Rank of the adapters; 0 trains without adapters."""
    alpha: Positive = 16.0
    """Scale of an adapter: its product is multiplied by ``alpha / rank``."""
    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = ("qkv", "proj")
    """Linear layers of each block that get an adapter: of attention (``qkv``, ``proj``) and of the MLP (``fc1``, ``fc2``)."""


Channels = tuple[float, float, float]
PositiveChannels = tuple[Positive, Positive, Positive]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image encoder E and the masked branch."""

    backbone: Annotated[str, Field(min_length=1)] = "small"
    """``small``, or the name of a timm Vision Transformer (``vit_base_patch32_224``)."""
    pretrained: str = ""
    """Initial weights of a timm backbone: a ``.safetensors`` file, a PyTorch state dict (``.bin``, ``.pt``, ``.pth``; read as
    weights only), or ``hub`` to download through timm; empty for random weights."""
    vit: VitConfig = field(default_factory=VitConfig)
    """Architecture of a timm backbone where it differs from the named model."""
    pixel_mean: Channels | None = None
    """Mean of R, G and B (in 0 to 1) that is subtracted from tiles. ``null``: the ``config.json`` next to the file of
    ``pretrained``, timm's value for ``hub``, otherwise ImageNet's."""
    pixel_std: PositiveChannels | None = None
    """Spread of R, G and B by which tiles are divided; ``null`` as for ``pixel_mean``."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters of the encoder."""
    stem: Literal["pixels", "efficientnet_lite0"] = "pixels"
    """Patch embedding of ``small``: a linear map of the pixels, or frozen EfficientNet features."""
    patch_px: Count = 32
    """Side of a patch in pixels (``small`` only)."""
    width: Count = 192
    """d, embedding width of the image encoder (``small`` only)."""
    depth: Count = 3
    """Transformer blocks (``small`` only)."""
    heads: Count = 4
    """Attention heads of ``small`` and of the mask feature generator."""
    mask_ratio: OpenShare = 0.5
    """r, share of patches hidden from the masked branch; ``loss.mfm=0`` disables masking."""
    target: Literal["self", "ema"] = "self"
    """Source of the target features: the encoder itself (detached) or its exponential moving average."""
    ema_decay: Share = 0.996
    """Decay of the moving average."""
    distance: Literal["smooth_l1", "mse", "cosine"] = "smooth_l1"
    """Distance between predicted and target features."""
