"""Application of views to decoded tiles: batched tensor operations on a GPU, a loop over tiles on a CPU.

On a CPU, numba compiles the loop if it is installed. All implementations return the values of the reference,
:func:`comtip_fast.data.augment.views.make_views`, with one exception: some pixel values of zoomed tiles may be rounded differently,
by 1, before the look-up tables map them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from comtip_fast.data.augment import views_compiled
from comtip_fast.data.augment.views import ViewPlan, rotate_flip

Empty = Callable[[tuple[int, ...]], np.ndarray]
"""Returns an uninitialised uint8 array of a shape."""


def new_array(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialised uint8 array, allocated by NumPy, which asks for huge pages."""
    return np.empty(shape, np.uint8)


def apply_views(
    tiles_NSS3: Tensor,
    plan: ViewPlan,
    *,
    batched: bool | None = None,
    compiled: bool | None = None,
    tensors: dict[str, Tensor] | None = None,
    empty: Empty = new_array,
) -> Tensor:
    """Apply a view plan to decoded tiles.

    Parameters
    ----------
    tiles_NSS3
        uint8 (N, S, S, 3), as decoders return them, on any device.
    plan
        Result of :func:`comtip_fast.data.augment.views.plan_views`.
    batched
        Whether to use batched tensor operations. By default they are used on all devices but the CPU, where they need much
        more memory bandwidth.
    compiled
        Whether to use numba to map pixel values on a CPU; by default if it is installed.
    tensors
        :meth:`.views.ViewPlan.tensors` on the device of the tiles; None copies them there, if they are needed.
    empty
        Allocates the result of operations that are not batched.

    Returns
    -------
    Tensor
        uint8 (N, 3, S, S), on the same device.
    """
    device = tiles_NSS3.device
    if batched is None:
        batched = device.type != "cpu"
    if tensors is None and (batched or plan.margin_N.any()):
        tensors = {name: t.to(device) for name, t in plan.tensors().items()}
    tiles = tiles_NSS3.permute(0, 3, 1, 2)
    if tensors is not None:
        tiles = _zoom(tiles, plan.margin_N, tensors["by_margin"])
        if batched:
            return _apply_batched(tiles, tensors["orientation"], tensors.get("lut"))
    out = empty(tuple(tiles.shape))
    _apply_on_cpu(tiles.numpy(), plan, views_compiled.is_installed() if compiled is None else compiled, out)
    return torch.from_numpy(out)


def apply_view(
    tile_SSC: np.ndarray, plan: ViewPlan, i: int, out_3SS: np.ndarray, *, compiled: bool | None = None
) -> None:
    """Apply view ``i`` of a plan without zoom to one tile on the CPU.

    Parameters
    ----------
    tile_SSC
        uint8, contiguous, of which the first three channels are used.
    plan, i
        Result of :func:`comtip_fast.data.augment.views.plan_views`, and the index of the view; its margin is not read.
    out_3SS
        uint8, contiguous; filled with the view.
    compiled
        As for :func:`apply_views`.
    """
    tile_1CSS, own = tile_SSC[None].transpose(0, 3, 1, 2), plan.select(slice(i, i + 1))
    _apply_on_cpu(tile_1CSS, own, views_compiled.is_installed() if compiled is None else compiled, out_3SS[None])


def _zoom(tiles_N3SS: Tensor, margin_N: np.ndarray, by_margin_N: Tensor) -> Tensor:
    """Crop the margins and resize to S; tiles with the same margin are resized in one call."""
    if not margin_N.any():
        return tiles_N3SS
    S = tiles_N3SS.shape[-1]
    out = torch.empty(tiles_N3SS.shape, dtype=torch.uint8, device=tiles_N3SS.device)
    margins, counts = np.unique(margin_N, return_counts=True)
    for margin, rows in zip(margins.tolist(), by_margin_N.split(counts.tolist()), strict=True):
        tiles = tiles_N3SS[rows]
        if margin:
            crop = tiles[..., margin : S - margin, margin : S - margin].float()
            tiles = interpolate(crop, size=(S, S), mode="bilinear", align_corners=False).round().to(torch.uint8)
        out[rows] = tiles
    return out


def _apply_on_cpu(tiles_NCSS: np.ndarray, plan: ViewPlan, compiled: bool, out_N3SS: np.ndarray) -> None:
    """Rotate and mirror tiles on the CPU one by one, and map their pixel values if the plan has look-up tables."""
    if plan.lut_N3V is not None and compiled:
        views_compiled.rotate_and_map(tiles_NCSS, plan.orientation_N, plan.lut_N3V, out_N3SS)
        return
    for i, out in enumerate(out_N3SS):
        tile = rotate_flip(tiles_NCSS[i, :3], int(plan.orientation_N[i]), (1, 2))
        if plan.lut_N3V is None:
            out[...] = tile
        else:
            for c in range(3):
                # np.take is about twice as fast here as indexing with an array.
                np.take(plan.lut_N3V[i, c], tile[c], out=out[c], mode="clip")


def _apply_batched(tiles_N3SS: Tensor, orientation_N: Tensor, lut_N3V: Tensor | None) -> Tensor:
    """Rotate and mirror all tiles at once, and map their pixel values if ``lut_N3V`` is given.

    No shape depends on the orientations.
    """
    N, _, S, _ = tiles_N3SS.shape
    turns_N, mirrored_N = orientation_N % 4, orientation_N >= 4
    # One quarter turn is a transposition and a flip of the rows; three are a transposition and a flip of the columns.
    rows_N = (turns_N == 1) | (turns_N == 2)
    columns_N = (turns_N >= 2) ^ mirrored_N
    out = tiles_N3SS.contiguous()
    out = torch.where((turns_N % 2 == 1)[:, None, None, None], out.transpose(2, 3), out)
    out = torch.where(rows_N[:, None, None, None], out.flip(2), out)
    out = torch.where(columns_N[:, None, None, None], out.flip(3), out)
    if lut_N3V is None:
        return out
    return lut_N3V.view(N * 3, 256).gather(1, out.reshape(N * 3, S * S).long()).view(N, 3, S, S)
