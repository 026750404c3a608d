"""Views of whole batches, fast: on a GPU as batched operations, on a CPU tile by tile without Python's hand on a pixel.

On a CPU code compiled by numba makes them in one pass where it is installed. All ways give what
:func:`comtip_fast.data.augment.views.make_views` gives.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from comtip_fast.data.augment import views_compiled
from comtip_fast.data.augment.views import ViewPlan, turn_tile


def apply_views(
    tiles_NSS3: Tensor, plan: ViewPlan, *, batched: bool | None = None, compiled: bool | None = None
) -> Tensor:
    """Turn decoded tiles into the views asked for.

    Parameters
    ----------
    tiles_NSS3
        uint8, as decoders give them, on any device.
    plan
        From :func:`comtip_fast.data.augment.views.plan_views`.
    batched
        Use batched operations; by default on everything but a CPU, where they move far more memory.
    compiled
        On a CPU, use numba; by default where it is installed.

    Returns
    -------
    uint8 (N, 3, S, S), on the same device.
    """
    tiles = _enlarge(tiles_NSS3.permute(0, 3, 1, 2), plan.margin_N)
    if batched is None:
        batched = tiles.device.type != "cpu"
    if batched:
        return _batched(tiles, plan)
    return _by_tile(tiles, plan, views_compiled.is_installed() if compiled is None else compiled)


def _enlarge(tiles_N3SS: Tensor, margin_N: np.ndarray) -> Tensor:
    """Zoom; tiles of one margin go together."""
    if not margin_N.any():
        return tiles_N3SS
    S = tiles_N3SS.shape[-1]
    out = torch.empty(tiles_N3SS.shape, dtype=torch.uint8, device=tiles_N3SS.device)
    for margin in np.unique(margin_N):
        rows = torch.from_numpy(np.flatnonzero(margin_N == margin)).to(tiles_N3SS.device)
        part = tiles_N3SS[rows]
        if margin:
            inner = part[..., margin : S - margin, margin : S - margin].float()
            part = interpolate(inner, size=(S, S), mode="bilinear", align_corners=False).round().to(torch.uint8)
        out[rows] = part
    return out


def _by_tile(tiles_N3SS: Tensor, plan: ViewPlan, compiled: bool) -> Tensor:
    N, _, S, _ = tiles_N3SS.shape
    source, target = tiles_N3SS.numpy(), np.empty((N, 3, S, S), np.uint8)  # NumPy asks for huge pages
    out = torch.from_numpy(target)
    if plan.table_N3V is None:
        for i in range(N):
            target[i] = turn_tile(source[i], int(plan.turn_N[i]), (1, 2))
        return out
    if compiled:
        views_compiled.turn_and_map(source, plan.turn_N, plan.table_N3V, target)
        return out
    flat, at = target.reshape(-1).data, 0
    for i in range(N):
        turned = turn_tile(source[i], int(plan.turn_N[i]), (1, 2))
        for c in range(3):
            # bytes.translate maps a byte in half a nanosecond, several times faster than indexing with an array.
            flat[at : at + S * S] = turned[c].tobytes().translate(plan.table_N3V[i, c].tobytes())
            at += S * S
    return out


def _batched(tiles_N3SS: Tensor, plan: ViewPlan) -> Tensor:
    N, _, S, _ = tiles_N3SS.shape
    device = tiles_N3SS.device
    out = torch.empty((N, 3, S, S), dtype=torch.uint8, device=device)
    for which in np.unique(plan.turn_N):
        rows = torch.from_numpy(np.flatnonzero(plan.turn_N == which)).to(device)
        turned = torch.rot90(tiles_N3SS[rows], int(which) % 4, (2, 3))
        out[rows] = turned.flip(3) if which >= 4 else turned
    if plan.table_N3V is None:
        return out
    table = torch.from_numpy(plan.table_N3V).to(device).view(N * 3, 256)
    return table.gather(1, out.view(N * 3, S * S).long()).view(N, 3, S, S)
