"""Augmented views of a tile, each a fixed function of (seed, spot, view).

View 0 is the tile as it is, its section's stain normalised. The others are also zoomed, turned by right angles,
mirrored, and their stain is jittered in optical-density space. A fixed, small number of views lets a frozen stem
be run once per view and kept.

:func:`plan_views` says what happens to each tile, as numbers; :func:`make_views` is the readable way of doing it and
:mod:`comtip_fast.data.augment.apply_views` the fast one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from comtip_shards.sampling.rng import key, uniform, uniform_rows
from comtip_shards.slides.tiles import StainStats, normalise_stain

from comtip_fast.config.schema import DataConfig


@dataclass(frozen=True)
class ViewPlan:
    """What is done to each of N tiles, in this order: cut off a margin and enlarge, turn, map the values."""

    margin_N: np.ndarray
    """int64, px cut off each side."""
    turn_N: np.ndarray
    """int64, 0 to 7: quarter turns, plus 4 where it is mirrored left to right afterwards."""
    table_N3V: np.ndarray | None
    """uint8 (N, 3, 256), what becomes of each value of each channel; None leaves every value as it is."""

    def part(self, rows: slice | np.ndarray) -> ViewPlan:
        """Return the plan of some of the tiles."""
        table = None if self.table_N3V is None else self.table_N3V[rows]
        return ViewPlan(self.margin_N[rows], self.turn_N[rows], table)


def view_of(n_views: int, spot_index: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Return which view each spot shows in this epoch: int64 (B,); every view once in ``n_views`` epochs."""
    start = np.floor(uniform(seed, "view", index=spot_index) * n_views).astype(np.int64)
    return (start + epoch) % n_views


def plan_views(
    spot_index: np.ndarray,
    view: np.ndarray,
    section: np.ndarray,
    stain_of: Callable[[int], StainStats],
    config: DataConfig,
    *,
    tile_px: int,
    seed: int,
) -> ViewPlan:
    """Say how the views asked for are made.

    Parameters
    ----------
    spot_index, view, section
        (N,) integers.
    stain_of
        Gives a section's stain.
    config
        ``stain``, ``flips``, ``jitter`` and ``zoom``.
    tile_px
        S, on which the margins of a zoom depend.
    seed
        The run's seed.
    """
    moved = view > 0
    most = int(tile_px * (1 - 1 / (1 + config.zoom)) / 2)
    margin = np.zeros(view.shape, np.int64)
    if most > 0:
        keys = [key(seed, "zoom", int(v), int(s)) for v, s in zip(view, spot_index, strict=True)]
        margin = np.where(moved, np.floor(uniform_rows(keys, 1)[:, 0] * (most + 1)), 0).astype(np.int64)
    turn = np.where(moved, view % 8, 0) if config.flips else np.zeros(view.shape, np.int64)
    table = None
    if config.stain == "section" or (config.jitter > 0 and moved.any()):
        table = _tables(spot_index, view, section, stain_of, config, seed)
    return ViewPlan(margin, turn, table)


def make_views(tiles_NSS3: np.ndarray, plan: ViewPlan) -> np.ndarray:
    """Return the views as uint8 (N, S, S, 3): the readable way, tile by tile."""
    out = np.empty_like(tiles_NSS3)
    for i, tile in enumerate(tiles_NSS3):
        view = turn_tile(_enlarge(tile, int(plan.margin_N[i])), int(plan.turn_N[i]))
        if plan.table_N3V is not None:
            view = np.stack([plan.table_N3V[i, c][view[..., c]] for c in range(3)], axis=-1)
        out[i] = view
    return out


def turn_tile(tile: np.ndarray, which: int, axes: tuple[int, int] = (0, 1)) -> np.ndarray:
    """Turn ``which % 4`` quarters, then mirror left to right where ``which`` is 4 or more; a view, not a copy."""
    turned = np.rot90(tile, which % 4, axes)
    return np.flip(turned, axes[1]) if which >= 4 else turned


def _enlarge(tile_SS3: np.ndarray, margin: int) -> np.ndarray:
    """Cut ``margin`` px off each side and resample what is left to S, linearly between the middles of pixels."""
    if margin == 0:
        return tile_SS3
    S = tile_SS3.shape[0]
    inner = tile_SS3[margin : S - margin, margin : S - margin].astype(np.float32)
    n = inner.shape[0]
    at = np.clip((np.arange(S, dtype=np.float32) + 0.5) * (n / S) - 0.5, 0, n - 1)
    low = np.floor(at).astype(np.int64)
    high, share = np.minimum(low + 1, n - 1), (at - low).astype(np.float32)
    rows = inner[low] * (1 - share)[:, None, None] + inner[high] * share[:, None, None]
    both = rows[:, low] * (1 - share)[None, :, None] + rows[:, high] * share[None, :, None]
    return np.rint(both).astype(np.uint8)


def _tables(
    spot_index: np.ndarray,
    view: np.ndarray,
    section: np.ndarray,
    stain_of: Callable[[int], StainStats],
    config: DataConfig,
    seed: int,
) -> np.ndarray:
    """Return uint8 (N, 3, 256): the section's stain normalised, then jittered.

    Values have 8 bits, so a table says exactly what normalising, rounding and jittering make of each.
    """
    table = np.empty((len(view), 3, 256), np.uint8)
    for s in np.unique(section):
        table[section == s] = stain_table(stain_of(int(s)) if config.stain == "section" else None)
    moved = np.flatnonzero(view > 0)
    if config.jitter > 0 and moved.size:
        keys = [key(seed, "jitter", int(view[i]), int(spot_index[i])) for i in moved]
        jitter = jitter_tables(uniform_rows(keys, 6), config.jitter)
        table[moved] = np.take_along_axis(jitter, table[moved].astype(np.int64), axis=2)
    return table


def stain_table(stain: StainStats | None) -> np.ndarray:
    """Return uint8 (3, 256), what stain normalisation makes of each value."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    return (ramp if stain is None else normalise_stain(ramp, stain)).T


def jitter_tables(u_N6: np.ndarray, spread: float) -> np.ndarray:
    """Scale and shift each channel's optical density by up to ``spread``, uniformly: uint8 (N, 3, 256)."""
    density = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)
    u = u_N6.astype(np.float32)[:, :, None]
    gain = 1 + spread * (2 * u[:, :3] - 1)
    shift = 0.2 * spread * (2 * u[:, 3:] - 1)
    moved = 256 * np.power(10.0, -(density * gain + shift)) - 1
    return np.clip(np.rint(moved), 0, 255).astype(np.uint8)
