"""Apply views to a batch of decoded tiles: batched tensor operations on a GPU, a loop over tiles on a CPU.

On a CPU, numba compiles the loop where it is installed. Every path returns the same values as the reference
implementation, :func:`comtip_fast.data.augment.views.make_views`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from comtip_fast.data.augment import views_compiled
from comtip_fast.data.augment.views import ViewPlan, rotate_flip


def apply_views(
    tiles_NSS3: Tensor, plan: ViewPlan, *, batched: bool | None = None, compiled: bool | None = None
) -> Tensor:
    """Apply a view plan to decoded tiles.

    Parameters
    ----------
    tiles_NSS3
        uint8, in the layout of the decoders, on any device.
    plan
        From :func:`comtip_fast.data.augment.views.plan_views`.
    batched
        Use batched tensor operations. Default: on every device but the CPU, where they use far more memory bandwidth.
    compiled
        On a CPU, use numba. Default: if it is installed.

    Returns
    -------
    uint8 (N, 3, S, S), on the same device.
    """
    tiles = _zoom(tiles_NSS3.permute(0, 3, 1, 2), plan.margin_N)
    if batched is None:
        batched = tiles.device.type != "cpu"
    if batched:
        return _apply_batched(tiles, plan)
    return _apply_per_tile(tiles, plan, views_compiled.is_installed() if compiled is None else compiled)


def _zoom(tiles_N3SS: Tensor, margin_N: np.ndarray) -> Tensor:
    """Crop and resize; tiles with the same margin are resized in one call."""
    if not margin_N.any():
        return tiles_N3SS
    S = tiles_N3SS.shape[-1]
    out = torch.empty(tiles_N3SS.shape, dtype=torch.uint8, device=tiles_N3SS.device)
    for margin in np.unique(margin_N):
        rows = torch.from_numpy(np.flatnonzero(margin_N == margin)).to(tiles_N3SS.device)
        tiles = tiles_N3SS[rows]
        if margin:
            crop = tiles[..., margin : S - margin, margin : S - margin].float()
            tiles = interpolate(crop, size=(S, S), mode="bilinear", align_corners=False).round().to(torch.uint8)
        out[rows] = tiles
    return out


def _apply_per_tile(tiles_N3SS: Tensor, plan: ViewPlan, compiled: bool) -> Tensor:
    N, _, S, _ = tiles_N3SS.shape
    # Allocated by NumPy, which asks for huge pages.
    source, out = tiles_N3SS.numpy(), np.empty((N, 3, S, S), np.uint8)
    if plan.lut_N3V is None:
        for i in range(N):
            out[i] = rotate_flip(source[i], int(plan.orientation_N[i]), (1, 2))
    elif compiled:
        views_compiled.rotate_and_map(source, plan.orientation_N, plan.lut_N3V, out)
    else:
        for i in range(N):
            tile = rotate_flip(source[i], int(plan.orientation_N[i]), (1, 2))
            for c in range(3):
                # np.take is about twice as fast here as indexing with an array.
                np.take(plan.lut_N3V[i, c], tile[c], out=out[i, c], mode="clip")
    return torch.from_numpy(out)


def _apply_batched(tiles_N3SS: Tensor, plan: ViewPlan) -> Tensor:
    N, _, S, _ = tiles_N3SS.shape
    device = tiles_N3SS.device
    out = torch.empty((N, 3, S, S), dtype=torch.uint8, device=device)
    for orientation in np.unique(plan.orientation_N):
        rows = torch.from_numpy(np.flatnonzero(plan.orientation_N == orientation)).to(device)
        rotated = torch.rot90(tiles_N3SS[rows], int(orientation) % 4, (2, 3))
        out[rows] = rotated.flip(3) if orientation >= 4 else rotated
    if plan.lut_N3V is None:
        return out
    lut = torch.from_numpy(plan.lut_N3V).to(device).view(N * 3, 256)
    return lut.gather(1, out.view(N * 3, S * S).long()).view(N, 3, S, S)
