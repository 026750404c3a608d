"""The image encoder that a method starts from: with the model's weights, or with the initial weights of its run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch

from comtip_fast.inference import Predictor
from comtip_fast.models import VisionEncoder


def pretrained_encoder(predictor: Predictor) -> VisionEncoder:
    """Return a trainable copy of the model's image encoder; a frozen stem stays frozen."""
    vision = copy.deepcopy(predictor.model.vision)
    return _trainable(vision)


def initial_weights(predictor: Predictor) -> str:
    """Return the path of the weights that the model's image encoder was initialised with; empty for random weights.

    Raises
    ------
    ValueError, FileNotFoundError
        The weights are on timm's hub, or the file does not exist.
    """
    found = predictor.bundle.initial_weights
    if predictor.config.vision.backbone == "small" or not found:
        return ""
    leave_out = "leave out the methods supervised and bleep, which start from these weights"
    if found == "hub":
        raise ValueError(
            "vision.pretrained=hub: the initial weights of the image encoder are on timm's hub, and an evaluation downloads "
            f"nothing; {leave_out}"
        )
    if not Path(found).is_file():
        raise FileNotFoundError(
            f"vision.pretrained={found}: the file of the image encoder's initial weights is missing; copy it there, or {leave_out}"
        )
    return found


def initial_encoder(predictor: Predictor, seed: int) -> VisionEncoder:
    """Return the image encoder of the model's config with the weights that its pretraining started from.

    These are the weights of the file ``vision.pretrained``, or random weights of ``seed``; ``train.start_from`` is ignored. A
    frozen stem is copied from the model, because pretraining does not change it.

    Raises
    ------
    ValueError, FileNotFoundError
        The initial weights are not in a local file, or the file cannot be used.
    """
    config = predictor.config.vision
    config = replace(config, pretrained=initial_weights(predictor), lora=replace(config.lora, rank=0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision = VisionEncoder(config, predictor.tile_px)
    model = predictor.model.vision
    vision.stem = copy.deepcopy(model.stem)
    vision.pixel_mean.copy_(model.pixel_mean)
    vision.pixel_std.copy_(model.pixel_std)
    if model.fused:
        vision.fuse()
    return _trainable(vision)


def _trainable(vision: VisionEncoder) -> VisionEncoder:
    """Return the encoder with all parameters trainable, except those of a frozen stem."""
    vision.requires_grad_(True)
    if vision.stem is not None:
        vision.stem.requires_grad_(False)
    return vision
