"""Weights of timm Vision Transformers from local files, resampled to the size of the tiles, and their pixel normalisation.

Files are safetensors, or PyTorch state dicts that are read as weights only, so that no code in a file is run.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from comtip_fast.config.vision import Channels, VisionConfig
from comtip_fast.models.stems import PIXEL_MEAN, PIXEL_STD

log = logging.getLogger("comtip_fast")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
UNUSED = ("head.", "head_dist.", "attn_pool.")
"""Prefixes of timm's weights that the encoder does not use: classifiers, and pooling by attention."""
ENCODER = ("cls_token", "reg_token", "dist_token", "pos_embed", "patch_embed", "norm_pre", "blocks", "norm", "fc_norm")
"""Top-level names of the modules and parameters of a Vision Transformer whose weights the encoder uses."""


@dataclass(frozen=True)
class LoadReport:
    """Result of loading a file of weights into an encoder."""

    matched: int
    """Number of tensors that were copied."""
    resampled: tuple[str, ...]
    """Names of the tensors that were resampled to the size of the tiles or patches, each with both shapes."""
    missing: tuple[str, ...]
    """Weights of the encoder that the file lacks; always empty, because such a file is refused."""
    unexpected: tuple[str, ...]
    """Tensors of the file that the encoder does not use: classifiers, attention pooling, decoders, mask tokens."""


def load_weights(vit: VisionTransformer, path: Path) -> LoadReport:
    """Load a file of weights and report it; position embeddings and the patch embedding are resampled to the model's size.

    Parameters
    ----------
    vit
        Model without classifier; changed in place.
    path
        A ``.safetensors`` file, or a state dict ``.bin``, ``.pt`` or ``.pth``.

    Raises
    ------
    ValueError
        The file is missing or cannot be read as weights, lacks weights of the encoder, or belongs to another architecture.
    """
    read = _read(path)
    try:
        state = checkpoint_filter_fn(read, vit)
    except (RuntimeError, KeyError, AttributeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(_misfit(path, f"cannot be converted for this model ({reason})", read)) from error
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    own = vit.state_dict()
    used = {k for k in own if not k.startswith(UNUSED)}
    missing = tuple(sorted(used - state.keys()))
    unexpected = tuple(sorted(state.keys() - used))
    # A tensor of the encoder that this model lacks means another architecture, e.g. more blocks.
    foreign = [k for k in unexpected if k.split(".")[0] in ENCODER and k not in own]
    other = [
        f"{k} {_shape(state[k])} instead of {_shape(own[k])}" for k in used & state.keys() if _differs(state, own, k)
    ]
    if missing or foreign or other:
        found = {"lacks": missing, "also holds": foreign, "has": sorted(other)}
        raise ValueError(_misfit(path, "; ".join(_some(what, names) for what, names in found.items() if names), read))
    vit.load_state_dict({k: state[k] for k in own if k in state}, strict=False)
    resampled = [f"{k} {_shape(read[k])} -> {_shape(own[k])}" for k in used & read.keys() if _differs(read, own, k)]
    report = LoadReport(len(used), tuple(sorted(resampled)), missing, unexpected)
    log.info(
        "vision.pretrained=%s: %d tensors loaded, none missing; resampled: %s; not used: %s",
        path,
        report.matched,
        ", ".join(report.resampled) or "none",
        _some(f"{len(unexpected)}", unexpected) if unexpected else "none",
    )
    return report


def normalisation(config: VisionConfig, vit: VisionTransformer | None = None) -> tuple[Channels, Channels]:
    """Return the mean and standard deviation of the channels with which an encoder's tiles are normalised.

    Parameters
    ----------
    config
        Settings of the encoder; ``pixel_mean`` and ``pixel_std`` take precedence.
    vit
        The timm model, whose own values are used for ``pretrained=hub``; other settings do not need it.

    Raises
    ------
    ValueError
        The ``config.json`` next to the weights is not a timm config, or its mean or standard deviation, or that of timm, cannot
        be used.
    """
    mean: Channels = PIXEL_MEAN
    std: Channels = PIXEL_STD
    origin = "ImageNet"
    if config.pretrained == "hub" and vit is not None:
        facts_of_timm: Any = vit.pretrained_cfg
        mean, std = _of_facts(facts_of_timm, "timm", config)
        origin = "timm"
    elif config.pretrained and config.backbone != "small":
        facts = Path(config.pretrained).parent / "config.json"
        if facts.is_file():
            mean, std = _of_facts(_read_facts(facts, config), str(facts), config)
            origin = str(facts)
    mean, std = config.pixel_mean or mean, config.pixel_std or std
    if config.pretrained and config.backbone != "small":
        of_mean, of_std = (origin if own is None else "the config" for own in (config.pixel_mean, config.pixel_std))
        log.info(
            "tiles are normalised with mean %s (from %s) and standard deviation %s (from %s)",
            mean,
            of_mean,
            std,
            of_std,
        )
    return mean, std


def _of_facts(facts: dict[str, Any], origin: str, config: VisionConfig) -> tuple[Channels, Channels]:
    """Return the mean and standard deviation that the config states, else those of a model description, else those of ImageNet."""
    out: list[Channels] = []
    for key, stated, default in (("mean", config.pixel_mean, PIXEL_MEAN), ("std", config.pixel_std, PIXEL_STD)):
        value = facts.get(key, default) if stated is None else stated
        try:
            r, g, b = (float(v) for v in value)
        except (TypeError, ValueError):
            r = g = b = math.nan
        if not all(map(math.isfinite, (r, g, b))) or (key == "std" and min(r, g, b) <= 0):
            raise ValueError(
                f"{origin}: {key}={value!r} of {config.backbone} is not a list of three usable numbers; set vision.pixel_{key}"
            )
        out.append((r, g, b))
    return out[0], out[1]


def _read_facts(path: Path, config: VisionConfig) -> dict[str, Any]:
    """Return ``pretrained_cfg`` of a model folder as timm writes it; warn if it describes another architecture."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        inner = facts.get("pretrained_cfg", facts)
        if not isinstance(inner, dict):
            raise TypeError("pretrained_cfg is not an object")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a model description of timm ({error}); repair it, or move the weights to another folder"
        ) from error
    named = facts.get("architecture")
    if isinstance(named, str) and named != config.backbone:
        log.warning(
            "%s describes %s, but vision.backbone=%s; check that the weights belong to this backbone",
            path,
            named,
            config.backbone,
        )
    return inner


def _read(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a file, without the prefixes of training checkpoints and compiled modules."""
    if not path.is_file():
        problem = "not a file" if path.exists() else "no such file"
        raise ValueError(f"vision.pretrained={path}: {problem}; give a file of weights, or hub to download them")
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"vision.pretrained={path}: the name does not end in {', '.join(SUFFIXES)}; give a file of one of these formats"
        )
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (
        SafetensorError,
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        reason = (str(error) or "the file ends too early").splitlines()[0]
        raise ValueError(
            f"vision.pretrained={path}: cannot be read as weights ({reason}); save a state dict, as safetensors if you can"
        ) from error
    return dict(state)


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape))


def _differs(a: dict[str, Tensor], b: dict[str, Tensor], name: str) -> bool:
    return a[name].shape != b[name].shape


def _some(what: str, names: Sequence[str]) -> str:
    """Return ``what``, the first three names, and the number of further names as text."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}"


def _misfit(path: Path, problem: str, state: dict[str, Tensor]) -> str:
    """Return the message for weights that do not fit the encoder, with the architecture that the file implies."""
    facts = describe(state)
    return (
        f"vision.pretrained={path}: the weights do not fit vision.backbone: the file {problem.splitlines()[0]}"
        + (f"; it holds {facts}" if facts else "")
        + "; give weights of vision.backbone, or set vision.backbone and vision.vit.* to the model of the file"
    )


def describe(state: dict[str, Tensor]) -> str:
    """Return the architecture of a timm state dict as ``vision.vit`` settings; empty if it is not a Vision Transformer."""
    blocks = {int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k))}
    patch = state.get("patch_embed.proj.weight")
    if not blocks or patch is None or patch.ndim != 4:
        return ""
    width, fc1 = int(patch.shape[0]), state.get("blocks.0.mlp.fc1.weight")
    fc2, registers = state.get("blocks.0.mlp.fc2.weight"), state.get("reg_token")
    facts = [f"depth={len(blocks)}", f"width={width}", f"patch_px={int(patch.shape[-1])}"]
    if fc1 is not None and fc2 is not None:
        facts.append(f"mlp={'swiglu' if fc1.shape[0] == 2 * fc2.shape[1] else 'mlp'}")
        facts.append(f"mlp_ratio={fc1.shape[0] / width:.6g}")
    facts.append(f"registers={0 if registers is None else registers.shape[1]}")
    facts.append(f"class_token={str('cls_token' in state).lower()}")
    facts.append("init_values above 0" if "blocks.0.ls1.gamma" in state else "no init_values")
    return "vision.vit." + ", ".join(facts)


def fill_normalisation(state: dict[str, Tensor], prefix: str) -> None:
    """Add ImageNet's mean and standard deviation to the weights of an encoder from a version that did not store them.

    Parameters
    ----------
    state
        State dict; changed in place if it has an encoder.
    prefix
        Prefix of the encoder's names, e.g. ``vision.``.
    """
    if not any(name.startswith(prefix + "blocks.") for name in state):
        return
    for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
        state.setdefault(prefix + name, torch.tensor(values).view(1, 3, 1, 1))
