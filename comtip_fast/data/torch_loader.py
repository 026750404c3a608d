"""Batches from a shard set with plain PyTorch: the reference loader, for one machine.

The order of spots is a function of (seed, epoch), everything drawn is a function of (seed, purpose, step or
epoch, spot), so a batch can be made again from four integers and resuming needs no loader state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from comtip_shards import ShardSet
from comtip_shards.order import epoch_batches
from torch import Tensor
from tqdm import tqdm

from comtip_fast.config.schema import RunConfig
from comtip_fast.data.batch import Batch
from comtip_fast.data.panel import draw_panel
from comtip_fast.data.tables import TrainingTables
from comtip_fast.data.views import make_views, view_of

log = logging.getLogger("comtip_fast")
Stem = Callable[[Tensor], Tensor]


class TorchLoader:
    """Makes batches of training spots.

    Parameters
    ----------
    shards
        The shard set.
    tables
        What :func:`comtip_fast.data.tables.training_tables` made of its training split.
    config
        The run.
    frozen_stem
        Maps uint8 tiles (N, 3, S, S) to features (N, P, c). Given, it is run once over every view of every
        training spot, in a fixed order (so that a resumed run gets the same bits), and batches carry features.
        That happens when the first batch is asked for: a run that is already finished does not wait for it.
    """

    def __init__(
        self, shards: ShardSet, tables: TrainingTables, config: RunConfig, frozen_stem: Stem | None = None
    ) -> None:
        self.shards, self.tables, self.config = shards, tables, config
        self.seed = config.train.seed
        self.section = shards.spots.loc[tables.spots, "section"].to_numpy()
        self._stem = frozen_stem

    def prepare(self) -> None:
        """Run the frozen stem now, where there is one; else the first batch does."""
        if self._stem is not None:
            self._cache  # noqa: B018

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's batches as arrays of spot indices."""
        data = self.config.data
        return epoch_batches(
            self.section, self.tables.spots, data.batch_size, data.sections_per_batch, self.seed, epoch
        )

    def batch(self, spot_index: np.ndarray, step: int, epoch: int) -> Batch:
        """Make one batch on the CPU."""
        place = np.searchsorted(self.tables.spots, spot_index)
        section = self.section[place]
        panel = self.panel(section, step)
        view = view_of(self.config.data.views, spot_index, seed=self.seed, epoch=epoch)
        tiles = features = None
        if self._stem is not None:
            features = self._cache[torch.from_numpy(view), torch.from_numpy(place)].float()
        else:
            tiles = torch.from_numpy(self.tiles(spot_index, view)).permute(0, 3, 1, 2)
        return Batch(
            tiles=tiles,
            features=features,
            panel=torch.from_numpy(panel.astype(np.int32)),
            levels=torch.from_numpy(self.tables.levels[place][:, panel]),
            measured=torch.from_numpy(self.tables.measured[section][:, panel]),
            section=torch.from_numpy(section.astype(np.int32)),
            spot_index=torch.from_numpy(spot_index.astype(np.int64)),
            step=step,
        )

    def panel(self, section: np.ndarray, step: int) -> np.ndarray:
        """Draw the step panel from the genes that the batch's sections measured; positions in ``trained``."""
        available = self.tables.measured[np.unique(section)].any(0)
        return draw_panel(
            self.tables.genes.trained,
            self.tables.variance,
            available,
            self.config.panel,
            seed=self.seed,
            step=step,
        )

    def tiles(self, spot_index: np.ndarray, view: np.ndarray) -> np.ndarray:
        """Return uint8 (N, S, S, 3) tiles in the views asked for."""
        raw = self.shards.tiles(spot_index)
        section = self.shards.spots.loc[spot_index, "section"].to_numpy()
        out = np.empty_like(raw)
        for s in np.unique(section):
            own = section == s
            stain = self.shards.stain(int(s)) if self.config.data.stain == "section" else None
            out[own] = make_views(raw[own], spot_index[own], view[own], stain, self.config.data, seed=self.seed)
        return out

    @cached_property
    def _cache(self) -> Tensor:
        """The frozen stem's features (views, n_spots, P, c) in half precision, made when the first batch is asked for."""
        stem = self._stem
        assert stem is not None
        views = []
        for view in range(self.config.data.views):
            log.info("frozen stem: view %d of %d, %d tiles", view + 1, self.config.data.views, len(self.tables.spots))
            parts = [stem(tiles).half() for tiles in self._chunks(view)]
            views.append(torch.cat(parts))
        return torch.stack(views)

    def _chunks(self, view: int, size: int = 128) -> Iterator[Tensor]:
        n = len(self.tables.spots)
        label = f"frozen stem, view {view + 1} of {self.config.data.views}"
        for start in tqdm(range(0, n, size), desc=label, leave=False, disable=None):
            spots = self.tables.spots[start : start + size]
            tiles = self.tiles(spots, np.full(spots.shape, view))
            yield torch.from_numpy(tiles).permute(0, 3, 1, 2)
