"""Image encoders that are compared with each other: a run or export, a timm model, ImageNet features, mean colour.

An encoder maps uint8 tiles to one feature vector per tile and is not trained further. :func:`open_encoder` parses the
specification that the command line takes. Nothing is downloaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from comtip_shards.slides.tiles import StainStats, stain_stats
from torch import Tensor, nn
from torch.nn import functional as F

from comtip_fast.constants import ENCODER_HELP
from comtip_fast.data.tile_sources import TileGeometry, TileSource
from comtip_fast.evaluation.feature_files import FeatureFiles
from comtip_fast.evaluation.train_reference import mean_colours
from comtip_fast.inference import Predictor
from comtip_fast.models.stems import PIXEL_MEAN, PIXEL_STD, EfficientNetLite0Stem
from comtip_fast.runtime.devices import autocast

RUN_FEATURES = ("pooled", "vector")


class TileEncoder(ABC):
    """Maps tiles to features."""

    label: str
    """Name in tables of results."""
    facts: dict[str, Any]
    """Facts about the encoder for the results, e.g. its kind and precision."""
    geometry: TileGeometry | None = None
    """Geometry of the tiles that the encoder needs; None if it resizes tiles of any size."""

    @abstractmethod
    def encode(self, tiles: TileSource, stain: StainStats | None = None) -> np.ndarray:
        """Return the features of all tiles of a section, float32 (N, F).

        ``stain`` holds the section's stain statistics. If it is None, an encoder that uses stain statistics computes them
        from the tiles.
        """


class ColourEncoder(TileEncoder):
    """Mean red, green and blue of a tile: the simplest baseline."""

    label = "colour"

    def __init__(self) -> None:
        self.facts = {"kind": "mean colour"}

    def encode(self, tiles: TileSource, stain: StainStats | None = None) -> np.ndarray:
        """Return mean colours, float32 (N, 3)."""
        return mean_colours(tiles).astype(np.float32)


class RunEncoder(TileEncoder):
    """The image encoder of a run or an export.

    Parameters
    ----------
    predictor
        The trained model.
    features
        ``pooled``: mean patch feature before projection. ``vector``: unit vector of the shared space.
    label
        Name in tables of results.
    """

    def __init__(self, predictor: Predictor, features: str = "pooled", label: str = "run") -> None:
        self.predictor, self._features, self.label = predictor, features, label
        self.geometry = TileGeometry(predictor.tile_px, predictor.tile_um, predictor.min_mpp)
        precision = predictor.config.train.precision
        self.facts = {"kind": "comtip", "features": features, "precision": precision, "run": predictor.config.name}

    def encode(self, tiles: TileSource, stain: StainStats | None = None) -> np.ndarray:
        """Return features, float32: (N, d) for ``pooled``, (N, D) for ``vector``."""
        if stain is None and self.predictor.normalises_stain:
            stain = stain_stats(tile for chunk in tiles.chunks() for tile in chunk.tiles_NSS3)
        found = self.predictor.image_features(tiles, stain, readout=False)
        return found.pooled_Nd if self._features == "pooled" else found.vector_ND


class NetworkEncoder(TileEncoder):
    """A frozen network. Tiles are resized to ``px`` and normalised with ``mean`` and ``std``."""

    def __init__(
        self, network: nn.Module, px: int, mean: Any, std: Any, *, label: str, device: torch.device, precision: str
    ) -> None:
        self.network, self.px, self.label = network.eval().to(device), px, label
        self._device, self._precision = device, precision
        self._mean, self._std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))
        self.facts = {"kind": "network", "input_px": px, "precision": precision}

    @torch.no_grad()
    def encode(self, tiles: TileSource, stain: StainStats | None = None) -> np.ndarray:
        """Return features, float32 (N, F); (0, 0) without tiles."""
        out: np.ndarray | None = None
        for rows, chunk in tiles.ahead():
            with autocast(self._precision, self._device):
                found = self.network(self._pixels(chunk)).float().cpu().numpy()
            out = np.zeros((len(tiles), found.shape[1]), np.float32) if out is None else out
            out[rows] = found
        return np.zeros((0, 0), np.float32) if out is None else out

    def _pixels(self, tiles_NSS3: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(tiles_NSS3.transpose(0, 3, 1, 2))).to(self._device).float() / 255
        if x.shape[-1] != self.px:
            x = F.interpolate(x, (self.px, self.px), mode="bicubic", antialias=True).clamp(0, 1)
        return (x - self._mean) / self._std


class _Lite0(nn.Module):
    """The EfficientNet-Lite0 stem on whole tiles; the model itself applies it to patches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = EfficientNetLite0Stem()
        self.stem.load_pretrained()

    def forward(self, x: Tensor) -> Tensor:
        return self.stem.raw(x)


def timm_encoder(spec: str, device: torch.device, precision: str, seed: int = 0) -> NetworkEncoder:
    """Return an encoder with a timm model without its classifier.

    ``spec`` is ``NAME`` for random weights, drawn with ``seed``, or ``NAME@FILE`` for weights from a file.

    Raises
    ------
    ValueError
        timm has no such model, or the weights cannot be read or do not fit.
    FileNotFoundError, PermissionError
        The file of weights does not exist, or there is no permission to read it.
    """
    name, _, file = spec.partition("@")
    if not timm.is_model(name):
        raise ValueError(f"timm:{name}: timm {timm.__version__} has no model of this name; see timm.list_models()")
    torch.manual_seed(seed)
    network = timm.create_model(name, pretrained=False, num_classes=0)
    if file:
        _load_weights(network, Path(file), name)
    settings = timm.data.resolve_model_data_config(network)
    encoder = NetworkEncoder(
        network,
        settings["input_size"][-1],
        settings["mean"],
        settings["std"],
        label=f"timm:{name}" if file else f"timm:{name} (random weights)",
        device=device,
        precision=precision,
    )
    encoder.facts |= {"model": name, "weights": Path(file).name if file else f"random, seed {seed}"}
    return encoder


def _load_weights(network: nn.Module, file: Path, name: str) -> None:
    """Load weights without unpickling code; a classifier in the file is ignored."""
    if not file.is_file():
        raise FileNotFoundError(f"timm:{name}@{file}: no such file; give a .safetensors or .pth file of weights")
    load: Callable[[Path], Any] = partial(torch.load, map_location="cpu", weights_only=True)
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        load = load_file
    try:
        state: Any = load(file)
    except OSError:
        raise
    except Exception as error:  # pickle and safetensors raise many kinds of errors
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: cannot be read as weights ({reason}); save a state dict") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file}: holds a {type(state).__name__} and no weights; save a state dict")
    state = next((state[k] for k in ("state_dict", "model") if isinstance(state.get(k), dict)), state)
    try:
        missing, _ = network.load_state_dict(state, strict=False)
    except (RuntimeError, AttributeError, TypeError) as error:  # tensors of other shapes, keys that are not names
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{file}: does not fit {name} ({reason}); give weights of this model") from error
    if missing:
        raise ValueError(
            f"{file}: lacks {len(missing)} of the weights of {name} ({', '.join(missing[:3])}); give weights of this model"
        )


def open_encoder(spec: str, device: torch.device, precision: str = "auto", seed: int = 0) -> TileEncoder | FeatureFiles:
    """Open an encoder, or files of embeddings, from a specification.

    :data:`comtip_fast.constants.ENCODER_HELP` lists the specifications. A network computes in ``precision``; a
    run or export uses the precision of its config. ``seed`` is the seed of random weights.

    Raises
    ------
    ValueError, FileNotFoundError, PermissionError
        The specification is unknown, or its files cannot be used.
    """
    kind, _, rest = spec.partition(":")
    if kind == "timm" and rest:
        return timm_encoder(rest, device, precision, seed)
    if kind == "embeddings" and rest:
        return FeatureFiles(rest)
    if spec == "colour":
        return ColourEncoder()
    if spec == "lite0":
        return NetworkEncoder(
            _Lite0(), 224, PIXEL_MEAN, PIXEL_STD, label="lite0 (ImageNet)", device=device, precision=precision
        )
    path, _, features = spec.rpartition("@")
    if features not in RUN_FEATURES or not path:
        path, features = spec, "pooled"
    if not Path(path).exists():
        raise FileNotFoundError(
            f"`encoders` {spec}: not an existing run or export, nor the name of an encoder; give {ENCODER_HELP}"
        )
    label = Path(path).name + ("" if features == "pooled" else f"@{features}")
    return RunEncoder(Predictor.load(path, device), features, label)
