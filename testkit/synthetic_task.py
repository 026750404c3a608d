"""The real training task on synthetic batches, without a shard set."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from comtip_shards.genes.identifiers import GeneResource

from comtip_fast.collectives import Group, share_of
from comtip_fast.config.schema import RunConfig
from comtip_fast.data.batch import Batch, pads_panels
from comtip_fast.data.upload import PackedTensors
from comtip_fast.genes import GeneTokenizer
from comtip_fast.genes.panel_sizes import padded_genes
from comtip_fast.genes.tokens import gene_tokens
from comtip_fast.models import CoMTIP, ModelSizes
from comtip_fast.training.losses import StepLosses
from comtip_fast.training.task import CoMTIPTask

SECTIONS = 64


@cache
def gene_names(n: int) -> list[tuple[str, str]]:
    """Return (symbol, name) of n protein-coding genes from the package's gene table, repeated if it has fewer."""
    rows = [r for r in GeneResource.load().rows if r.kind == "protein"]
    return [(r.symbol, r.name) for r in (rows * (n // len(rows) + 1))[:n]]


class SyntheticLoader:
    """Loader of synthetic batches with the sizes of the config and arbitrary values.

    Parameters
    ----------
    config, group
        The run and its ranks.
    n_genes
        Number of genes, of which a panel takes evenly spaced ones.
    tile_px
        Width of a tile in px.
    features
        (patches, width) if batches hold features instead of tiles, else None.
    device
        Device of the batches.
    """

    def __init__(
        self,
        config: RunConfig,
        n_genes: int,
        tile_px: int,
        group: Group,
        features: tuple[int, int] | None,
        device: torch.device,
    ) -> None:
        self.config, self.n_genes, self.tile_px, self.group, self.features = config, n_genes, tile_px, group, features
        self.device = device
        G = min(config.panel.max_genes, n_genes)
        self.panel = np.arange(G, dtype=np.int32) * (n_genes // G)
        """Panel of the next batch; every batch has the same one unless this is set."""
        self.first_spot = 0
        """Index of the first spot of the next batch."""

    def metrics(self) -> dict[str, float]:
        """Return constant metrics of a loader."""
        return {"loader_wait_s": 0.0, "faults": 0}

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return eight global batches."""
        return [np.arange(self.config.data.batch_size)] * 8

    def batch(self, spots: np.ndarray, step: int, epoch: int) -> Batch:
        """Return this rank's share of a batch on the device, uploaded as in :meth:`BaseLoader._deliver`."""
        own = share_of(len(spots), self.group.rank, self.group.size)
        b, G = own.stop - own.start, len(self.panel)
        index = torch.arange(own.start, own.stop) + self.first_spot
        Q, S = self.config.levels.n_levels, self.tile_px
        tiles = torch.empty(b, 3, S, S, dtype=torch.uint8) if self.features is None else None
        features = None if self.features is None else torch.empty(b, *self.features)
        levels = ((index[:, None] * 7 + torch.arange(G) * 3) % Q).to(torch.uint8)
        panel = torch.from_numpy(self.panel)
        section = (index % self.config.data.sections_per_batch).to(torch.int32)
        measured = torch.ones(b, G, dtype=torch.bool)
        batch = Batch(tiles, features, panel, levels, measured, section, index, step, panel_host=self.panel)
        if pads_panels(self.config, self.device):
            size = padded_genes(G, self.config.engine.panel_sizes, self.config.panel.max_genes)
            batch = batch.padded(size, self.n_genes)
        return batch.with_tensors(PackedTensors.pack(batch.tensors(), self.device).to(self.device))


class SyntheticTask(CoMTIPTask):
    """The real task on a synthetic loader.

    Parameters
    ----------
    config, group
        The run and its ranks.
    tile_px
        Width of a tile in px.
    device
        Device on which the model is built.
    """

    def __init__(self, config: RunConfig, group: Group, tile_px: int, device: torch.device) -> None:
        self.config, self.group, self.device = config, group, device
        self.tokenizer = GeneTokenizer.load()
        n = max(config.genes.per_cohort, config.panel.max_genes)
        self.sizes = ModelSizes(
            tile_px=tile_px,
            n_levels=config.levels.n_levels,
            vocab_size=self.tokenizer.vocab_size,
            n_identities=n,
            longest=config.text.max_tokens + 2,
        )
        with torch.device(device):
            self.model = CoMTIP(config, self.sizes)
            self.model.fuse_blocks(config.engine, device)
        stem = self.model.vision.stem
        features = None if stem is None else (self.model.vision.n_patches, stem.width)
        loader: Any = SyntheticLoader(config, n, tile_px, group, features, device)
        self.loader = loader
        self.genes = gene_tokens(self.tokenizer, gene_names(n), np.arange(1, n + 1), config.text).to(device)
        prior, strata = torch.zeros(n, config.levels.n_levels), torch.zeros(SECTIONS, n, dtype=torch.int64)
        self.step = StepLosses(config, self.genes, prior.to(device), strata.to(device), group)

    def fingerprint(self) -> dict[str, str]:
        """Return an empty fingerprint."""
        return {}
