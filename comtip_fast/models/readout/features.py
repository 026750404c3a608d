"""Image features of the readout: which features of a tile it has, and how they are computed.

A tile has the vector z of the shared space and, with a frozen stem, the mean and standard deviation over patches of the stem's
features. Shapes: B tiles, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comtip_fast.models.comtip import CoMTIP, ImageOutput
from comtip_fast.models.readout.section_statistics import ADJACENT
from comtip_fast.models.stems import LAST_STAGES

BLOCKS = ("vector", "frozen")
LAST_NAME = "mean and standard deviation of the frozen stem's patch features"
STAGES_NAME = "mean and standard deviation of the patch features of all stages of the frozen stem"
N_VIEWS = 8
RADII = (ADJACENT, 3.4)
"""Radii of the means over neighbouring spots, as multiples of the spacing of the spots (docs/ablations.md)."""
VIEW_ORDER = (0, 6, 2, 4, 1, 3, 5, 7)
"""Order in which orientations are used: unchanged, turned by 180 degrees and mirrored, turned, mirrored, then the others."""


@dataclass(frozen=True)
class ReadoutSettings:
    """Settings of the computation of features, which an export stores with the weights."""

    views: int = 2
    """Number of flips and rotations to average over, 1 to 8."""
    radii: tuple[float, ...] = RADII
    """Radii, as multiples of the spacing of the spots, within which the mean over neighbouring spots is computed; features are
    concatenated with these means."""
    vector_dim: int = 0
    """Number of leading tile features that are the shared-space vector; the other features come from the frozen stem."""
    stages: bool = True
    """Whether the features of the frozen stem are those of all its stages; otherwise, those that the encoder embeds."""

    @classmethod
    def of_header(cls, settings: Mapping[str, Any]) -> ReadoutSettings:
        """Return the settings that a file states; version 1 had means over adjacent spots, or none (``context``)."""
        if "context" in settings:
            radii = (ADJACENT,) if settings["context"] else ()
            return cls(settings["views"], radii, settings["vector_dim"], stages=False)
        return cls(**{**settings, "radii": tuple(settings["radii"])})

    @property
    def context(self) -> bool:
        """Whether features of neighbouring spots are used."""
        return bool(self.radii)

    def width(self, n_features: int) -> int:
        """Return the number of features per tile, given their number F with the means over neighbours."""
        return n_features // (1 + len(self.radii))

    def columns(self, block: str, n_features: int) -> np.ndarray:
        """Return the int64 columns of a block among F features, including its means over neighbours."""
        width = self.width(n_features)
        own = np.arange(self.vector_dim) if block == "vector" else np.arange(self.vector_dim, width)
        return np.concatenate([own + i * width for i in range(1 + len(self.radii))])

    def block_names(self, n_features: int) -> list[str]:
        """Return the blocks that have columns."""
        return [b for b in BLOCKS if self.columns(b, n_features).size]


def turn_tiles(tiles_BCHW: Tensor, view: int) -> Tensor:
    """Return the tiles under one of the 8 flips and rotations: ``view % 4`` right angles, mirrored if ``view >= 4``."""
    flipped = tiles_BCHW.flip(-1) if view >= 4 else tiles_BCHW
    return torch.rot90(flipped, view % 4, (-2, -1))


def feature_width(model: CoMTIP, settings: ReadoutSettings) -> int:
    """Return the number of features per tile, without neighbours."""
    stem = model.vision.stem
    if stem is None:
        return settings.vector_dim
    return settings.vector_dim + 2 * (sum(stem.stage_widths) if settings.stages else stem.width)


def frozen_columns(model: CoMTIP, settings: ReadoutSettings) -> dict[str, np.ndarray]:
    """Return the int64 columns, among the features per tile, of the frozen stem's features, by a name for reports.

    If ``settings.stages``, they are the features of the last stages with stride 16 and 32, and of all stages, otherwise those that
    the encoder embeds; each as mean and standard deviation. Empty without a stem.
    """
    stem = model.vision.stem
    if stem is None:
        return {}
    if not settings.stages:
        return {LAST_NAME: settings.vector_dim + np.arange(2 * stem.width)}
    ends = np.cumsum(stem.stage_widths)
    mean = np.concatenate(
        [np.arange(ends[i] - stem.stage_widths[i], ends[i]) for i in (number - 1 for number in LAST_STAGES)]
    )
    return {
        LAST_NAME: settings.vector_dim + np.concatenate([mean, ends[-1] + mean]),
        STAGES_NAME: settings.vector_dim + np.arange(2 * ends[-1]),
    }


def penalty_scale(model: CoMTIP, settings: ReadoutSettings) -> np.ndarray:
    """Return the factor of every feature of the heads in the ridge penalty, with which each stage of the stem has equal weight.

    A stage with few channels, whose features are those of textures and edges, would hardly count compared with one of many.
    """
    scale, stem = np.ones(feature_width(model, settings)), model.vision.stem
    if stem is not None and settings.stages:
        widths = np.array(stem.stage_widths)
        of_stages = np.repeat(np.sqrt(widths.mean() / widths), widths)
        scale[settings.vector_dim :] = np.concatenate([of_stages, of_stages])
    return np.tile(scale, 1 + len(settings.radii))


def tile_features(model: CoMTIP, tiles_BCHW: Tensor, settings: ReadoutSettings) -> tuple[ImageOutput, Tensor]:
    """Encode tiles under several views.

    Parameters
    ----------
    model
        The model.
    tiles_BCHW
        uint8 tiles, stain-normalised.
    settings
        Number of views, and which features of a frozen stem.

    Returns
    -------
    output, features
        The output for the unchanged tiles, and float32 (B, F) features averaged over the views, on the device of the model.
    """
    output, total = _view_features(model, tiles_BCHW, settings.stages)
    for view in VIEW_ORDER[1 : settings.views]:
        total = total + _view_features(model, turn_tiles(tiles_BCHW, view).contiguous(), settings.stages)[1]
    return output, total / settings.views


def _view_features(model: CoMTIP, tiles_BCHW: Tensor, stages: bool) -> tuple[ImageOutput, Tensor]:
    """Return the encoder's output and float32 features (B, F).

    Features are z and, with a frozen stem, the mean and standard deviation over the patches of the features of its stages, or
    of those that the encoder embeds.
    """
    if model.vision.stem is None:
        output = model.encode_image(model.vision.stem_features(tiles_BCHW))
        return output, output.vector_BD.float()
    if stages:
        encoded, features = model.vision.stem_stages(tiles_BCHW)
    else:
        encoded = features = model.vision.stem_features(tiles_BCHW)
    output = model.encode_image(encoded)
    features = features.float()  # under autocast, statistics of bf16 features would be rounded to bf16, too
    frozen = [features.mean(1), features.std(1)]
    return output, torch.cat([p.float() for p in (output.vector_BD, *frozen)], dim=1)
