"""Augmented views of a tile, each a fixed function of (seed, spot, view).

View 0 is the tile as it is. The others are turned by right angles, mirrored, and their stain is jittered in
optical-density space. A fixed, small number of views lets a frozen stem be run once per view and kept.
"""

from __future__ import annotations

import numpy as np
from comtip_shards.keyed import uniform
from comtip_shards.tiles import StainStats, normalise_stain

from comtip_fast.config.schema import DataConfig


def view_of(n_views: int, spot_index: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Return which view each spot shows in this epoch: int64 (B,); every view once in ``n_views`` epochs."""
    start = np.floor(uniform(seed, "view", index=spot_index) * n_views).astype(np.int64)
    return (start + epoch) % n_views


def make_views(
    tiles_NSS3: np.ndarray, spot_index: np.ndarray, view: np.ndarray, stain: StainStats | None, config: DataConfig, *,
    seed: int,
) -> np.ndarray:  # fmt: skip
    """Return uint8 tiles (N, S, S, 3) of one section, stain-normalised and turned into the views asked for."""
    tiles = tiles_NSS3 if stain is None else normalise_stain(tiles_NSS3, stain)
    out = np.array(tiles)
    for i in np.flatnonzero(view > 0):
        if config.flips:
            out[i] = _turn(tiles[i], int(view[i]) % 8)
        if config.jitter > 0:
            u = uniform(seed, "jitter", int(view[i]), int(spot_index[i]), index=np.arange(6))
            out[i] = _jitter(out[i], u, config.jitter)
    return out


def _turn(tile_SS3: np.ndarray, which: int) -> np.ndarray:
    turned = np.rot90(tile_SS3, which % 4)
    return turned[:, ::-1] if which >= 4 else turned


def _jitter(tile_SS3: np.ndarray, u: np.ndarray, spread: float) -> np.ndarray:
    """Scale and shift each channel's optical density by up to ``spread``, uniformly."""
    # A channel has 256 values, so a table of them says what becomes of each pixel.
    density = -np.log10((np.arange(256, dtype=np.float32)[:, None] + 1) / 256)
    gain = 1 + spread * (2 * u[:3].astype(np.float32) - 1)
    shift = 0.2 * spread * (2 * u[3:].astype(np.float32) - 1)
    moved = 256 * np.power(10.0, -(density * gain + shift)) - 1
    table = np.clip(np.rint(moved), 0, 255).astype(np.uint8)
    return np.stack([table[:, c][tile_SS3[..., c]] for c in range(3)], axis=-1)
