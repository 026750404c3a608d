"""The real training task on generated batches, which are pinned and uploaded as by the real loaders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from comtip_fast.collectives import Group, SingleProcessGroup
from comtip_fast.config.io import load_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.data.batch import Batch
from comtip_fast.data.upload import PackedTensors
from comtip_fast.training.distributed.comm_timer import ClockedGroup
from comtip_fast.training.engines.base import set_product_precision
from comtip_fast.training.losses import Numbers, Parts
from testkit.synthetic_task import SECTIONS, SyntheticTask

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "data.batch_size=32",
    "genes.per_cohort=30",
    "panel.max_genes=24",
    "levels.n_levels=5",
    "vision.backbone=small",
    "vision.patch_px=16",
    "vision.width=32",
    "vision.depth=1",
    "vision.heads=2",
    "text.width=32",
    "text.depth=1",
    "text.heads=2",
    "text.max_tokens=6",
    "align.dim=32",
    "optim.warmup_steps=5",
    "train.validate_every=0",
    "train.log_every=1",
    "train.patience=0",
)
"""Overrides of configs/1gpu.yaml for runs that are small enough to be repeated on a CPU."""
TINY_PX = 32
"""Width of a tile in px in these runs."""


class GeneratedBatches:
    """Loader of a few generated batches, in which tiles are brighter where the first half of the genes is high.

    A batch is packed in host memory when it is first requested; after that, it costs only one upload.

    Parameters
    ----------
    config
        Config of the run.
    n_genes
        Number of rows of the gene table.
    tile_px
        Width of a tile in px.
    device
        Device of the batches.
    panels
        Panel sizes G; batch ``i`` has the size ``panels[i % len(panels)]``.
    pool
        Number of different batches.
    """

    def __init__(
        self, config: RunConfig, n_genes: int, tile_px: int, device: torch.device, panels: tuple[int, ...], pool: int
    ) -> None:
        self.config, self.n_genes, self.tile_px, self.device = config, n_genes, tile_px, device
        self.panels, self.pool = panels, pool
        self._packed: dict[int, tuple[Batch, PackedTensors]] = {}

    def prepare(self) -> None:
        """Pack every batch."""
        for i in range(self.pool):
            self._get(i)

    def close(self) -> None:
        """Do nothing: there are no workers."""

    def metrics(self) -> dict[str, float]:
        """Return constant metrics of a loader."""
        return {"loader_wait_s": 0.0, "faults": 0}

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the global batches of any epoch as spot indices."""
        B = self.config.data.batch_size
        return [np.arange(B) + B * i for i in range(self.pool)]

    def batch(self, spots: np.ndarray, step: int, epoch: int) -> Batch:
        """Return a batch on the device."""
        batch, packed = self._get(int(spots[0]) // self.config.data.batch_size % self.pool)
        out = batch.with_tensors(packed.to(self.device))
        out.step = step
        return out

    def _get(self, i: int) -> tuple[Batch, PackedTensors]:
        if i not in self._packed:
            batch = self._generate(i)
            self._packed[i] = batch, PackedTensors.pack(batch.tensors(), self.device)
        return self._packed[i]

    def _generate(self, i: int) -> Batch:
        g = torch.Generator().manual_seed(1000 + i)
        B, S, Q = self.config.data.batch_size, self.tile_px, self.config.levels.n_levels
        G = self.panels[i % len(self.panels)]
        field_B = torch.rand(B, generator=g)
        sign_G = torch.arange(G) < G // 2
        share = torch.where(sign_G, field_B[:, None], 1 - field_B[:, None])
        noisy = share + 0.2 * torch.randn(B, G, generator=g)
        levels = (noisy * Q).clamp(0, Q - 1).to(torch.uint8)
        texture = torch.randint(100, (3, S, S), generator=g, dtype=torch.uint8)
        tiles = texture + (field_B * 150).to(torch.uint8)[:, None, None, None]
        panel = torch.randperm(self.n_genes, generator=g)[:G].sort().values.to(torch.int32)
        section = torch.arange(B, dtype=torch.int32) % self.config.data.sections_per_batch % SECTIONS
        measured = torch.rand(B, G, generator=g) < 0.95
        index = torch.arange(B) + B * i
        return Batch(tiles, None, panel, levels, measured, section, index, 0, panel_host=panel.numpy())


class GeneratedTask(SyntheticTask):
    """The real task on generated batches, with initial weights that are the same on every device.

    Parameters
    ----------
    config, device, group
        Config, device and ranks of the run; by default one process.
    tile_px, panels, pool
        As for :class:`GeneratedBatches`.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        group: Group | None = None,
        *,
        tile_px: int = TINY_PX,
        panels: tuple[int, ...] = (24, 7, 16),
        pool: int = 8,
    ) -> None:
        self.seen: list[Tensor] = []
        """Loss of every step, on the device."""
        torch.manual_seed(config.train.seed)
        cpu = torch.device("cpu")
        super().__init__(config, group or SingleProcessGroup(), tile_px, cpu)
        self.model.genes.set_attention(config.text.attention)
        self.model.fuse_blocks(config.engine, device)
        if config.engine.compile:
            self.model.compile_blocks()
        self.device, self.model, self.genes = device, self.model.to(device), self.genes.to(device)
        self.step.genes = self.genes
        self.step.log_prior, self.step.strata = self.step.log_prior.to(device), self.step.strata.to(device)
        self.loader = GeneratedBatches(config, self.sizes.n_identities, tile_px, device, panels, pool)  # type: ignore[assignment]

    def losses(self, module: nn.Module, batch: Batch) -> tuple[Parts, Numbers]:
        """Return the losses, and keep the total in ``seen``."""
        parts, numbers = super().losses(module, batch)
        self.seen.append(parts["loss"].detach())
        return parts, numbers

    def export(self, folder: Path) -> None:
        """Create only the folder: there is no shard set that an export could describe."""
        folder.mkdir(exist_ok=True)


def config_of(device: torch.device, *overrides: str) -> RunConfig:
    """Return configs/1gpu.yaml for a device; unless an override sets it, nothing is compiled, because that takes a minute."""
    own = [f"train.device={device.type}", "engine.compile=false"]
    return load_config(ROOT / "configs" / "1gpu.yaml", [*own, *overrides])


def tiny_config(device: torch.device, *overrides: str) -> RunConfig:
    """Return a small config, in fp32 unless an override sets another precision."""
    return config_of(device, *TINY, "train.precision=fp32", *overrides)


def clocked(group: Group, config: RunConfig, device: torch.device) -> Group:
    """Set the precision of matrix products, and return the group with the communication timer that the trainer reads."""
    torch.set_float32_matmul_precision("highest")  # the default, which an earlier run of this process may have changed
    set_product_precision(config, device)
    return ClockedGroup(group, device)
