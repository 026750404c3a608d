"""CoMTIP as a training task: batches in, named losses out. The loop knows nothing of what is in here.

L = w_nce L_nce + w_mfm L_mfm + w_pair L_pair + w_level L_level (docs/method.md). Every random draw is
hash(seed, purpose, step, spot), so a step can be repeated anywhere from its number and its spots.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from comtip_kernels import infonce, level_cross_entropy, pair_scores, pool_weights, table_pool
from comtip_shards import ShardSet
from comtip_shards.keyed import uniform
from torch import Tensor, nn

from comtip_fast.config.schema import RunConfig
from comtip_fast.data.batch import Batch
from comtip_fast.data.gene_tokens import gene_tokens, take_genes
from comtip_fast.data.levels import log1p_cp10k
from comtip_fast.data.loaders import make_loader
from comtip_fast.data.tables import TrainingTables, training_tables
from comtip_fast.data.torch_loader import TorchLoader
from comtip_fast.genes import GeneTokenizer
from comtip_fast.inference import Bundle, mean_pcc, predict_trained
from comtip_fast.models import CoMTIP, ModelSizes, StepOutput
from comtip_fast.models.gene_encoder import GeneTokens
from comtip_fast.objectives import (
    choose_hardest,
    counted_swaps,
    feature_health,
    masked_feature_loss,
    pair_auc,
    pair_loss,
    permute_within_strata,
    same_text_ids,
    take_from_other_spots,
)

VALIDATION_GENES = 50


def build_task(config: RunConfig, device: torch.device) -> CoMTIPTask:
    """Open the shard set, work out the training tables and build the model, all from the config."""
    torch.manual_seed(config.train.seed)
    shards = ShardSet(config.data.shards)
    tables = training_tables(shards, config)
    tokenizer = GeneTokenizer.load()
    sizes = ModelSizes(
        tile_px=shards.manifest.tile.px,
        n_levels=config.levels.n_levels,
        vocab_size=tokenizer.vocab_size,
        n_identities=tables.genes.trained.size,
        longest=config.text.max_tokens + 2,
    )
    model = CoMTIP(config, sizes)
    if model.vision.stem is not None:
        model.vision.stem.load_pretrained()
    return CoMTIPTask(config, shards, tables, tokenizer, model.to(device), sizes)


def pick_device(wanted: str) -> torch.device:
    """Turn ``auto``, ``cpu`` or ``cuda`` into a device; ``cuda`` without a GPU is an error."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but PyTorch sees no GPU; use auto or cpu, or see `comtip doctor`")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


class CoMTIPTask:
    """Joins model, data and losses; satisfies :class:`comtip_fast.training.protocol.TrainingTask`."""

    def __init__(
        self, config: RunConfig, shards: ShardSet, tables: TrainingTables, tokenizer: GeneTokenizer, model: CoMTIP,
        sizes: ModelSizes,
    ) -> None:  # fmt: skip
        self.config, self.shards, self.tables, self.sizes = config, shards, tables, sizes
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        stem = self._stem if model.vision.stem is not None else None
        if model.vision.stem is not None:
            self._standardise_stem()
        self.loader = make_loader(config, shards, tables, device=self.device, frozen_stem=stem)
        rows = tables.genes.trained
        names = [(shards.genes[r].symbol, shards.genes[r].name) for r in rows]
        self.genes = gene_tokens(tokenizer, names, np.arange(1, rows.size + 1), config.text).to(self.device)
        self.log_prior = torch.from_numpy(tables.table.log_prior).to(self.device)
        self._valid_features: dict[int, Tensor] = {}

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

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's batches as spot indices, a function of (seed, epoch)."""
        return self.loader.batches(epoch)

    def batch(self, spot_index: np.ndarray, step: int, epoch: int) -> Batch:
        """Make one batch on this task's device."""
        return self.loader.batch(spot_index, step, epoch).to(self.device)

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return ``{"loss": total, part: ...}`` as scalars with gradients, and plain numbers to log."""
        out = self.model(self._features(batch), *self._mask(batch), self._panel_genes(batch))
        weights = self.config.loss
        parts: dict[str, Tensor] = {}
        numbers = {"genes": float(batch.panel.numel()), "scale": float(out.scale_nce.detach())}
        mispaired, counted = self._mispair(batch, out)
        if weights.nce > 0:
            parts["nce"] = self._nce(batch, out, mispaired, counted)
        if weights.mfm > 0 and out.predicted_BKd is not None and out.target_BKd is not None:
            parts["mfm"] = masked_feature_loss(out.predicted_BKd, out.target_BKd, self.config.vision.distance)
        if weights.pair > 0 and mispaired is not None and counted is not None:
            parts["pair"], auc = self._pair(batch, out, mispaired, counted)
            numbers |= auc
        if weights.level > 0:
            rows = batch.panel.long()
            parts["level"] = level_cross_entropy(
                out.image.vector_BD, out.table.unit_GQD, batch.levels.long(), batch.measured, out.scale_level,
                self.log_prior[rows],
            )  # fmt: skip
        if self._logs(batch.step):
            numbers |= feature_health(out.image.patches_BPd)
        total = sum((getattr(weights, name) * value for name, value in parts.items()), out.scale_nce * 0)
        return {"loss": total, **parts}, numbers

    def after_step(self, step: int) -> None:
        """Let the EMA teacher follow."""
        self.model.update_teacher(self.config.vision.ema_decay)

    @torch.no_grad()
    def validate(self) -> tuple[float, dict[str, float]]:
        """Return the mean zero-shot PCC over the validation sections, and each task's."""
        scores: dict[str, list[float]] = {}
        for section in self._validation_sections():
            task = self.shards.task_of_section(section)
            pcc = self._validate_section(section, task)
            if pcc is not None:
                scores.setdefault(task, []).append(pcc)
        per_task = {task: float(np.mean(values)) for task, values in scores.items()}
        return float(np.mean(list(per_task.values()))) if per_task else float("nan"), per_task

    def export(self, folder: Path) -> None:
        """Write weights, levels, genes and config as they are now."""
        self.bundle().save(folder)

    def bundle(self) -> Bundle:
        """Return everything that evaluation and prediction need."""
        return Bundle.from_training(self.config, self.sizes, self.model, self.shards, self.tables, self.tokenizer)

    def fingerprint(self) -> dict[str, str]:
        """Return hashes of what the run reads: a resumed run must find the same."""
        return {"shards": self.shards.manifest.digest, "tokenizer": self.tokenizer.sha256}

    # -- parts of a step ------------------------------------------------------------------------------

    def _features(self, batch: Batch) -> Tensor:
        if batch.features is not None:
            return batch.features
        assert batch.tiles is not None
        return self.model.vision.stem_features(batch.tiles)

    def _mask(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Draw the hidden patches: floor(r P) of each tile, by the rank of keyed uniforms."""
        if self.config.loss.mfm <= 0:
            return None, None
        P = self.model.vision.n_patches
        hidden = int(self.config.vision.mask_ratio * P)
        u = uniform(self.config.train.seed, "mask", batch.step, index=batch.spots()[:, None] * P + np.arange(P))
        order = torch.from_numpy(u.argsort(axis=1, kind="stable")).to(self.device)
        return order[:, hidden:].sort(dim=1).values, order[:, :hidden].sort(dim=1).values

    def _panel_genes(self, batch: Batch) -> GeneTokens:
        rows = batch.panel.long()
        genes = take_genes(self.genes, rows)
        if self.config.text.identity_drop > 0:
            u = uniform(self.config.train.seed, "identity", batch.step, index=rows.cpu().numpy())
            keep = torch.from_numpy(u >= self.config.text.identity_drop).to(self.device)
            genes = GeneTokens(genes.ids_GT, genes.length_G, genes.identity_G * keep)
        return genes

    @torch.no_grad()
    def _mispair(self, batch: Batch, out: StepOutput) -> tuple[Tensor | None, Tensor | None]:
        """Return the adversary's levels (B, G) and which of its swaps count; None for a panel of one gene."""
        paat = self.config.loss.paat
        wanted = self.config.loss.pair > 0 or paat.hard_columns
        if batch.panel.numel() < 2 or not wanted:
            return None, None
        levels = batch.levels.long()
        candidates = self._candidates(batch, levels)
        counted = counted_swaps(levels, candidates, batch.measured, paat.min_level_shift)
        if paat.adversary == "random" or candidates.shape[0] == 1:
            return candidates[0], counted[0]
        logits = torch.stack([self._pair_logits(batch, out, c) for c in candidates])
        best = choose_hardest(logits, counted)
        rows = torch.arange(best.shape[0], device=best.device)
        return candidates[best, rows], counted[best, rows]

    def _candidates(self, batch: Batch, levels: Tensor) -> Tensor:
        """Draw C whole mispairings (C, B, G): within strata, from other spots, or by a coin per spot."""
        paat, seed, spots = self.config.loss.paat, self.config.train.seed, batch.spots()
        panel = batch.panel.long()
        index = spots[:, None] * (1 << 20) + panel.cpu().numpy()

        def draw(purpose: str) -> Tensor:
            u = [uniform(seed, purpose, batch.step, c, index=index) for c in range(paat.candidates)]
            return torch.from_numpy(np.stack(u)).to(self.device)

        section = batch.section.long()
        strata = self.tables.strata.to(self.device)[section][:, panel]
        within = permute_within_strata(levels, strata, draw("mispair-from"), draw("mispair-to"))
        if paat.mode == "strata":
            return within
        others = take_from_other_spots(levels, section, draw("mispair-spot"))
        if paat.mode == "spots":
            return others
        coin = torch.from_numpy(uniform(seed, "mispair-mode", batch.step, index=spots) < 0.5).to(self.device)
        return torch.where(coin[None, :, None], within, others)

    def _pair_logits(self, batch: Batch, out: StepOutput, levels: Tensor, roll: int = 0) -> Tensor:
        """Return pair-head logits of the sentences (g, levels) in each spot's context."""
        table = out.table
        if self.config.loss.paat.context == "image":
            return pair_scores(out.image.vector_BD.roll(roll, 0), table.pair_GQD, levels)
        true = batch.levels.long().roll(roll, 0)
        measured = batch.measured.roll(roll, 0)
        weight = pool_weights(table.scores_GQ, true, measured)
        pooled = table_pool(table.unit_GQD, table.scores_GQ, true, measured)
        return pair_scores(
            pooled,
            table.pair_GQD,
            levels,
            true_levels_BG=true,
            projected_GQD=table.unit_GQD,
            weight_BG=weight,
        )

    def _nce(self, batch: Batch, out: StepOutput, mispaired: Tensor | None, counted: Tensor | None) -> Tensor:
        """Align images with texts; mispaired texts in which something counts are further columns."""
        table, levels, measured = out.table, batch.levels.long(), batch.measured
        section = batch.section.long()
        use = torch.zeros_like(section, dtype=torch.bool) if counted is None else counted.any(1)
        if not self.config.loss.paat.hard_columns:
            use = torch.zeros_like(use)
        all_levels = levels if mispaired is None else torch.cat([levels, mispaired[use]])
        all_measured = torch.cat([measured, measured[use]])
        ids = same_text_ids(all_levels, all_measured)
        return infonce(
            out.image.vector_BD,
            table_pool(table.rows_GQD, table.scores_GQ, all_levels, all_measured),
            out.scale_nce,
            negatives=self.config.align.negatives,
            group_rows=section,
            group_columns=torch.cat([section, section[use]]),
            class_rows=ids[: section.numel()],
            class_columns=ids,
            weight_B=measured.any(1).to(out.image.vector_BD.dtype),
        )

    def _pair(
        self, batch: Batch, out: StepOutput, mispaired: Tensor, counted: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        levels = batch.levels.long()
        true, false = self._pair_logits(batch, out, levels), self._pair_logits(batch, out, mispaired)
        numbers = {}
        if self._logs(batch.step):
            with torch.no_grad():
                true_elsewhere = self._pair_logits(batch, out, levels, roll=1)
                false_elsewhere = self._pair_logits(batch, out, mispaired, roll=1)
            auc = pair_auc(true.detach(), false.detach(), counted)
            # The part of the AUC that knowing this very spot is worth; marginals alone give the rest.
            numbers = {"pair_auc": auc, "pair_auc_gain": auc - pair_auc(true_elsewhere, false_elsewhere, counted)}
        return pair_loss(true, false, counted), numbers

    def _logs(self, step: int) -> bool:
        return step % self.config.train.log_every == 0

    # -- validation and the frozen stem ---------------------------------------------------------------

    def _validation_sections(self) -> list[int]:
        return [i for i, s in enumerate(self.shards.manifest.sections) if s.split == "val"]

    def _validate_section(self, section: int, task: str) -> float | None:
        ranked = self.tables.genes.ranked.get(task)
        if ranked is None:
            return None
        known = self.shards.measured(section)
        rows = [r for r in ranked if known[r]]
        trained = self.tables.genes.trained
        rows = [r for r in rows if r in set(trained.tolist())][:VALIDATION_GENES]
        if not rows:
            return None
        spots = self.shards.select(sections=[section])
        measured = log1p_cp10k(self.shards.counts(spots))[:, rows].toarray()
        place = torch.from_numpy(np.searchsorted(trained, rows)).to(self.device)
        image = self.model.encode_image(self._section_features(section, spots)).vector_BD
        predicted = predict_trained(self.model, take_genes(self.genes, place), image, self.tables.table, place)
        return mean_pcc(measured, predicted["cp10k"])

    def _section_features(self, section: int, spots: np.ndarray) -> Tensor:
        if section not in self._valid_features:
            _, tiles = self.loader.tiles(spots, np.zeros(spots.shape, np.int64))
            self._valid_features[section] = self.model.vision.stem_features(tiles.to(self.device))
        return self._valid_features[section]

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
