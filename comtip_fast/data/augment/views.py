"""Augmented views of a tile; a view is a deterministic function of (seed, spot, view).

View 0 is the original tile. The other views differ from it in zoom (``data.zoom``), in orientation (``data.flips``: quarter turns
and mirror images) and in optical density (``data.jitter``). With ``data.stain=section``, the section's stain is normalised in all
views. The number of views is small and fixed, so the output of a frozen stem can be computed once per view and cached.

:func:`plan_views` computes the parameters of each view, :func:`make_views` is the reference implementation, and
:mod:`comtip_fast.data.augment.apply_views` is the fast one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from comtip_shards.sampling.rng import key, uniform, uniform_rows
from comtip_shards.slides.tiles import StainStats, normalise_stain
from torch import Tensor

from comtip_fast.config.schema import DataConfig


@dataclass(frozen=True)
class ViewPlan:
    """Parameters of the views of N tiles, applied in this order: zoom, rotate and mirror, map pixel values."""

    margin_N: np.ndarray
    """int64, pixels cropped from each side before resizing to the full size."""
    orientation_N: np.ndarray
    """int64, 0 to 7: number of quarter turns, plus 4 if the tile is then mirrored left to right."""
    lut_N3V: np.ndarray | None
    """uint8 (N, 3, 256), look-up table of each channel's pixel values; None leaves all values unchanged."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors for batched operations on a device: ``orientation``, ``by_margin`` and, if set, ``lut``.

        ``by_margin`` is the permutation that sorts the tiles by margin.
        """
        order = np.argsort(self.margin_N, kind="stable")
        out = {"orientation": torch.from_numpy(self.orientation_N), "by_margin": torch.from_numpy(order)}
        return out if self.lut_N3V is None else out | {"lut": torch.from_numpy(self.lut_N3V)}

    def margins_only(self) -> ViewPlan:
        """Return the plan without what :meth:`tensors` has; batched operations read nothing else of a plan on the host."""
        return ViewPlan(self.margin_N, self.orientation_N[:0], None)

    def select(self, rows: slice | np.ndarray) -> ViewPlan:
        """Return the plan of a subset of the tiles."""
        lut = None if self.lut_N3V is None else self.lut_N3V[rows]
        return ViewPlan(self.margin_N[rows], self.orientation_N[rows], lut)


def view_indices(n_views: int, spot_index: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Return the view of each spot in ``epoch``, int64 (B,); over ``n_views`` epochs, each view is used once."""
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
    """Compute the parameters of the requested views.

    Parameters
    ----------
    spot_index, view, section
        Spot, view and section of each tile, integers (N,).
    stain_of
        Returns a section's stain statistics.
    config
        ``stain``, ``flips``, ``jitter`` and ``zoom`` are read.
    tile_px
        S, side of a tile in pixels, to which the margins of a zoom are proportional.
    seed
        The run's seed.
    """
    augmented = view > 0
    max_margin = int(tile_px * (1 - 1 / (1 + config.zoom)) / 2)
    margin = np.zeros(view.shape, np.int64)
    if max_margin > 0:
        keys = [key(seed, "zoom", int(v), int(s)) for v, s in zip(view, spot_index, strict=True)]
        drawn = np.floor(uniform_rows(keys, 1)[:, 0] * (max_margin + 1))
        margin = np.where(augmented, drawn, 0).astype(np.int64)
    orientation = np.where(augmented, view % 8, 0) if config.flips else np.zeros(view.shape, np.int64)
    lut = None
    if config.stain == "section" or (config.jitter > 0 and augmented.any()):
        lut = _lookup_tables(spot_index, view, section, stain_of, config, seed)
    return ViewPlan(margin, orientation, lut)


def make_views(tiles_NSS3: np.ndarray, plan: ViewPlan) -> np.ndarray:
    """Return the views of tiles, uint8 (N, S, S, 3), one tile at a time; the reference implementation."""
    out = np.empty_like(tiles_NSS3)
    for i, tile in enumerate(tiles_NSS3):
        view = rotate_flip(_zoom(tile, int(plan.margin_N[i])), int(plan.orientation_N[i]))
        if plan.lut_N3V is not None:
            view = np.stack([plan.lut_N3V[i, c][view[..., c]] for c in range(3)], axis=-1)
        out[i] = view
    return out


def rotate_flip(tile: np.ndarray, orientation: int, axes: tuple[int, int] = (0, 1)) -> np.ndarray:
    """Return a tile rotated by ``orientation % 4`` quarter turns, and mirrored left to right if ``orientation >= 4``.

    ``axes`` are the array's row axis and column axis. The result is a view of the array.
    """
    rotated = np.rot90(tile, orientation % 4, axes)
    return np.flip(rotated, axes[1]) if orientation >= 4 else rotated


def _zoom(tile_SS3: np.ndarray, margin: int) -> np.ndarray:
    """Crop ``margin`` px from each side and resize to S, bilinearly between pixel centres."""
    if margin == 0:
        return tile_SS3
    S = tile_SS3.shape[0]
    crop = tile_SS3[margin : S - margin, margin : S - margin].astype(np.float32)
    n = crop.shape[0]
    x = np.clip((np.arange(S, dtype=np.float32) + 0.5) * (n / S) - 0.5, 0, n - 1)
    low = np.floor(x).astype(np.int64)
    high, fraction = np.minimum(low + 1, n - 1), (x - low).astype(np.float32)
    rows = crop[low] * (1 - fraction)[:, None, None] + crop[high] * fraction[:, None, None]
    both = rows[:, low] * (1 - fraction)[None, :, None] + rows[:, high] * fraction[None, :, None]
    return np.rint(both).astype(np.uint8)


def _lookup_tables(
    spot_index: np.ndarray,
    view: np.ndarray,
    section: np.ndarray,
    stain_of: Callable[[int], StainStats],
    config: DataConfig,
    seed: int,
) -> np.ndarray:
    """Return look-up tables, uint8 (N, 3, 256): stain normalisation of the section, followed by jitter.

    Pixel values have 8 bits, so a table of 256 entries is exact, including the rounding between the two operations.
    """
    lut = np.empty((len(view), 3, 256), np.uint8)
    for s in np.unique(section):
        lut[section == s] = stain_table(stain_of(int(s)) if config.stain == "section" else None)
    augmented = np.flatnonzero(view > 0)
    if config.jitter > 0 and augmented.size:
        keys = [key(seed, "jitter", int(view[i]), int(spot_index[i])) for i in augmented]
        jitter = jitter_tables(uniform_rows(keys, 6), config.jitter)
        lut[augmented] = np.take_along_axis(jitter, lut[augmented].astype(np.int64), axis=2)
    return lut


def stain_table(stain: StainStats | None) -> np.ndarray:
    """Return the look-up table of stain normalisation, uint8 (3, 256); None gives the identity."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    return (ramp if stain is None else normalise_stain(ramp, stain)).T


def jitter_tables(u_N6: np.ndarray, strength: float) -> np.ndarray:
    """Return the look-up tables of stain jitter, uint8 (N, 3, 256).

    Each channel's optical density is multiplied by a factor in 1 +- ``strength``, then shifted by an amount in +- 0.2 ``strength``;
    both are uniform.

    Parameters
    ----------
    u_N6
        Uniform numbers in [0, 1): three for the scales, then three for the shifts.
    strength
        ``data.jitter``.
    """
    density = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)
    u = u_N6.astype(np.float32)[:, :, None]
    gain = 1 + strength * (2 * u[:, :3] - 1)
    shift = 0.2 * strength * (2 * u[:, 3:] - 1)
    value = 256 * np.power(10.0, -(density * gain + shift)) - 1
    return np.clip(np.rint(value), 0, 255).astype(np.uint8)
