"""CoMTIP as a training task: data, model, validation and export. The loop knows nothing of what is in here.

The losses are in :mod:`comtip_fast.training.losses`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from comtip_shards import ShardSet
from torch import Tensor, nn

from comtip_fast.collectives import Group, SingleProcessGroup, share_of
from comtip_fast.config.schema import RunConfig
from comtip_fast.data.batch import Batch
from comtip_fast.data.expression.training_tables import TrainingTables, training_tables
from comtip_fast.data.loaders.factory import make_loader
from comtip_fast.data.loaders.torch import TorchLoader
from comtip_fast.export import Bundle
from comtip_fast.genes import GeneTokenizer
from comtip_fast.genes.tokens import gene_tokens
from comtip_fast.models import CoMTIP, ModelSizes
from comtip_fast.models.image_encoder import check_mask, patches_per_side
from comtip_fast.training.losses import LossInputs, Numbers, Parts, StepLosses
from comtip_fast.training.validation import Validation
from comtip_fast.training.warm_start import start_from


def build_task(
    config: RunConfig, device: torch.device, group: Group | None = None, *, initialise: bool = True
) -> CoMTIPTask:
    """Open the shard set, work out the training tables and build the model, all from the config; alike on all ranks.

    Parameters
    ----------
    config, device, group
        Of the run.
    initialise
        Read the weights that the config begins with (``vision.pretrained``, ``train.start_from``). False where a
        checkpoint holds all weights: those files may be gone by then.
    """
    torch.manual_seed(config.train.seed)
    shards = ShardSet(config.data.shards)
    if config.vision.backbone == "small":  # before the tables, which can take long
        check_vision(config, patches_per_side(config.vision, config.vision.patch_px, shards.manifest.tile.px) ** 2)
    tables = training_tables(shards, config)
    tokenizer = GeneTokenizer.load()
    sizes = ModelSizes(
        tile_px=shards.manifest.tile.px,
        n_levels=config.levels.n_levels,
        vocab_size=tokenizer.vocab_size,
        n_identities=tables.genes.trained.size,
        longest=config.text.max_tokens + 2,
    )
    vision = config.vision if initialise else replace(config.vision, pretrained="")
    model = CoMTIP(replace(config, vision=vision), sizes)
    check_vision(config, model.vision.n_patches)
    if model.vision.stem is not None:
        model.vision.stem.load_pretrained()
    if config.engine.compile:
        model.compile_blocks()
    task = CoMTIPTask(config, shards, tables, tokenizer, model.to(device), sizes, group or SingleProcessGroup())
    if config.train.start_from and initialise:
        # After the task has set the stem's output scale from its own tiles: the encoder was trained on the old scale.
        keys = [shards.genes[row].key for row in tables.genes.trained]
        start_from(task.model, config.train.start_from, keys, tokenizer.sha256)
    return task


def check_vision(config: RunConfig, n_patches: int) -> None:
    """Refuse masking that hides no patch."""
    if config.loss.mfm > 0:
        check_mask(config.vision, n_patches)


def _as_model(module: nn.Module) -> CoMTIP:
    assert isinstance(module, CoMTIP)
    return module


class CoMTIPTask:
    """Joins model, data and losses; satisfies :class:`comtip_fast.training.protocol.TrainingTask`."""

    def __init__(
        self,
        config: RunConfig,
        shards: ShardSet,
        tables: TrainingTables,
        tokenizer: GeneTokenizer,
        model: CoMTIP,
        sizes: ModelSizes,
        group: Group,
    ) -> None:
        self.config, self.shards, self.tables, self.sizes, self.group = config, shards, tables, sizes, group
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        stem = self._stem if model.vision.stem is not None else None
        if model.vision.stem is not None:
            self._standardise_stem()
        self.loader = make_loader(
            config, shards, tables, rank=group.rank, world=group.size, device=self.device, frozen_stem=stem
        )
        rows = tables.genes.trained
        names = [(shards.genes[r].symbol, shards.genes[r].name) for r in rows]
        self.genes = gene_tokens(tokenizer, names, np.arange(1, rows.size + 1), config.text).to(self.device)
        self.step = StepLosses(
            config,
            self.genes,
            torch.from_numpy(tables.table.log_prior).to(self.device),
            tables.strata.to(self.device),
            group,
        )
        self.validation = Validation(model, shards, tables, self.loader, self.genes, config)

    @property
    def module(self) -> nn.Module:
        """All parameters."""
        return self.model

    def describe(self) -> str:
        """Say in a few lines what is about to be trained on what."""
        genes, count = self.tables.genes, sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        lines = [
            f"{count / 1e6:.2f} M parameters to train on {self.tables.spots.size} spots; "
            f"{genes.trained.size} genes trained, {genes.held_out.size} held out by name"
        ]
        for task, rows in genes.ranked.items():
            lines.append(f"  {task}: {rows.size} genes pass genes.min_detection")
        return "\n".join(lines)

    def prepare(self) -> None:
        """Run a frozen stem over the training tiles."""
        self.loader.prepare()

    def close(self) -> None:
        """Stop the loader's workers."""
        self.loader.close()

    def metrics(self) -> dict[str, float]:
        """Return seconds spent waiting for batches, of the rank that waited longest, and damaged records, of all ranks.

        Damaged records are told in all and, where there are any, by kind.
        """
        own = self.loader.metrics()
        wait = self.group.max(torch.tensor(own.pop("loader_wait_s"), device=self.device))
        counts = self.group.sum(torch.tensor(list(own.values()), device=self.device)).tolist()
        faults = {name: n for name, n in zip(own, counts, strict=True) if n or name == "faults"}
        return {"loader_wait_s": float(wait), **faults}

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's batches as spot indices, a function of (seed, epoch)."""
        return self.loader.batches(epoch)

    def batch(self, spot_index: np.ndarray, step: int, epoch: int) -> Batch:
        """Make this rank's share of one global batch, on this task's device."""
        batch = self.loader.batch(spot_index, step, epoch).to(self.device)
        batch.global_size = len(spot_index)
        return batch

    def losses(self, module: nn.Module, batch: Batch) -> tuple[Parts, Numbers]:
        """Return this rank's shares ``{"loss": total, part: ...}`` as scalars with gradients, and numbers to log."""
        out = self.step.encode(_as_model(module), batch)
        heads = LossInputs.of(out)
        parts, numbers = self.step.embedding_losses(batch, heads)
        mfm = self.step.masked(out, sum(self.step.counts(batch)))
        if mfm is not None:
            parts["mfm"] = mfm
        return self.step.weighted_total(parts, heads), numbers | self.step.health(batch, out)

    # -- the same in pieces, see comtip_fast.training.grad_cache ------------------------------------------

    def pieces(self, batch: Batch, n: int) -> list[Batch]:
        """Cut this rank's share into ``n`` pieces, fewer where a rank has fewer spots; as many on every rank."""
        b, n = batch.section.numel(), max(1, min(n, min(self.step.counts(batch))))
        return [batch.select(share_of(b, i, n)) for i in range(n)]

    def embed(self, module: nn.Module, piece: Batch, table: bool) -> dict[str, Tensor]:
        """Return image vectors, and with ``table`` the sentence table and scales."""
        out = self.step.encode(_as_model(module), piece, masked=False, table=table)
        return LossInputs.of(out).tensors() if table else {"vector": out.image.vector_BD}

    def join(self, embedded: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Put all image vectors beside the one table."""
        with_table = max(embedded, key=len)
        return with_table | {"vector": torch.cat([e["vector"] for e in embedded])}

    def losses_of(self, batch: Batch, tensors: dict[str, Tensor]) -> tuple[Parts, Numbers]:
        """Return the losses over spots and sentences."""
        heads = LossInputs.from_tensors(tensors)
        parts, numbers = self.step.embedding_losses(batch, heads)
        return self.step.weighted_total(parts, heads), numbers

    def replay(
        self, module: nn.Module, batch: Batch, piece: Batch, gradients: dict[str, Tensor], table: bool
    ) -> tuple[Tensor, Parts, Numbers]:
        """Return <gradients, what embedding gives again> + w_mfm L_mfm, and L_mfm's share."""
        out = self.step.encode(_as_model(module), piece, table=table)
        again = LossInputs.of(out).tensors() if table else {"vector": out.image.vector_BD}
        scalar = torch.stack([(again[name] * gradients[name]).sum() for name in again]).sum()
        mfm = self.step.masked(out, sum(self.step.counts(batch)))
        if mfm is None:
            return scalar, {}, self.step.health(piece, out)
        weighted = self.config.loss.mfm * mfm
        return scalar + weighted, {"mfm": mfm, "loss": weighted}, self.step.health(piece, out)

    def cut(self, gradients: dict[str, Tensor], pieces: list[Batch]) -> list[dict[str, Tensor]]:
        """Give each piece its vectors' gradients."""
        vectors = gradients["vector"].split([p.section.numel() for p in pieces])
        return [gradients | {"vector": v} for v in vectors]

    def after_step(self, module: nn.Module, step: int) -> None:
        """Let the EMA teacher follow."""
        _as_model(module).update_teacher(self.config.vision.ema_decay)

    def validate(self) -> tuple[float, dict[str, float], dict[str, float]]:
        """Return the mean zero-shot PCC over the validation sections, each task's, and the shared space in numbers."""
        return self.validation.score()

    def export(self, folder: Path) -> None:
        """Write weights, levels, genes and config as they are now."""
        self.bundle().save(folder)

    def bundle(self) -> Bundle:
        """Return everything that evaluation and prediction need."""
        return Bundle.from_training(self.config, self.sizes, self.model, self.shards, self.tables, self.tokenizer)

    def fingerprint(self) -> dict[str, str]:
        """Return hashes of what the run reads: a resumed run must find the same."""
        return {"shards": self.shards.manifest.digest, "tokenizer": self.tokenizer.sha256}

    # -- the frozen stem ------------------------------------------------------------------------------

    @torch.no_grad()
    def _stem(self, tiles: Tensor) -> Tensor:
        return self.model.vision.stem_features(tiles.to(self.device)).cpu()

    @torch.no_grad()
    def _standardise_stem(self) -> None:
        """Set the stem's output mean and spread from training tiles, so that its channels weigh alike."""
        stem = self.model.vision.stem
        assert stem is not None
        spots = self.tables.spots[:: max(1, self.tables.spots.size // 256)]
        loader = TorchLoader(self.shards, self.tables, self.config)
        _, tiles = loader.tiles(spots, np.zeros(spots.shape, np.int64))
        raw = torch.cat([stem.raw(self.model.vision.cut(t.to(self.device)).flatten(0, 1)) for t in tiles.split(64)])
        stem.out_mean.copy_(raw.mean(0))
        stem.out_std.copy_(raw.std(0).clamp_min(1e-4))
