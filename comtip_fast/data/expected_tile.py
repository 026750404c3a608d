"""Check that the tiles of a shard set are those that a config expects."""

from __future__ import annotations

import logging
import math
import re

from comtip_shards import ShardSet

from comtip_fast.config.schema import RunConfig

log = logging.getLogger("comtip_fast")


def check_expected_tile(config: RunConfig, shards: ShardSet) -> None:
    """Compare the tiles of a shard set with ``data.tile_px`` and ``data.tile_um``, where these are set, before training.

    Without ``data.tile_px``, a warning is logged if the name of the backbone states another tile size, as
    ``vit_base_patch32_224`` does: the model can be built, but patches have another scale than it was designed for.

    Raises
    ------
    ValueError
        The tiles differ from ``data.tile_px`` or ``data.tile_um``; the message states both tiles and the fix.
    """
    tile, data = shards.manifest.tile, config.data
    px, um = data.tile_px or tile.px, data.tile_um or tile.um
    if px != tile.px or not math.isclose(um, tile.um, rel_tol=1e-6):
        keys = [
            f"data.{key}={value:.10g}"
            for key, value in (("tile_px", data.tile_px), ("tile_um", data.tile_um))
            if value is not None
        ]
        raise ValueError(
            f"{shards.name}: tiles of {tile.um:.10g} um in {tile.px} px, but the config states {' '.join(keys)}; build the set "
            f"again with `tile_um={um:.10g}` `tile_px={px}`, or train on this set with "
            f"`data.tile_px={tile.px}` `data.tile_um={tile.um:.10g}`"
        )
    native = re.search(r"_(\d{3})$", config.vision.backbone)
    if data.tile_px is None and native is not None and int(native[1]) != tile.px:
        log.warning(
            "vision.backbone=%s was designed for tiles of %s px, but %s has %d px; build the set with `tile_px=%s`, or "
            "set `data.tile_px=%d` to keep this set",
            config.vision.backbone,
            native[1],
            shards.name,
            tile.px,
            native[1],
            tile.px,
        )
