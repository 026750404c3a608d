"""Decoding of a batch's tiles with Pillow, and their views on a CPU."""

from __future__ import annotations

from functools import partial

import torch
from comtip_shards import ShardError, ShardSet
from comtip_shards.format.tile_decoder import TileDecoder
from torch import Tensor

from comtip_fast.data.augment.apply_views import Empty, apply_view
from comtip_fast.data.augment.views import ViewPlan
from comtip_fast.data.records import EncodedSpots


def decode_views(shards: ShardSet, encoded: EncodedSpots, plan: ViewPlan, empty: Empty) -> Tensor | None:
    """Decode the tiles of intact records and compute their views, one tile at a time.

    A decoded tile is used while it is in the core's cache, and is not copied.

    Parameters
    ----------
    shards
        The shard set.
    encoded
        Records of b spots.
    plan
        The views of the b tiles, without zoom.
    empty
        Allocates the result.

    Returns
    -------
    Tensor or None
        uint8 (b, 3, S, S); None if a tile is damaged.
    """
    tile = shards.manifest.tile
    decoder = TileDecoder(tile.px, tile.codec)
    out = empty((encoded.spots.size, 3, tile.px, tile.px))
    for i, (spot, data) in enumerate(zip(encoded.spots.tolist(), encoded.tiles, strict=True)):
        try:
            pixels = decoder.decode(data, partial(shards.where, spot))
        except ShardError:
            return None
        apply_view(pixels, plan, i, out[i])
    return torch.from_numpy(out)
