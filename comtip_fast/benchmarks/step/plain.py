"""CoMTIP's step in straightforward PyTorch, with the same weights, draws and losses.

For every spot, true and mispaired sentences are encoded, padded to the longest; the table of all (gene, level) sentences is
encoded for L_level, and the adversary's candidates are scored from it. Logits and scores are stored. The masked branch runs over
all patches with the hidden ones masked in attention. Four optimisations are included: attention is PyTorch's fused
kernel, chunks of sentences are checkpointed so that they fit into memory, lookups use ``F.embedding``, and candidates are not encoded.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from comtip_kernels import infonce, level_cross_entropy
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from comtip_fast.benchmarks.step.contender import StepContender, Updater
from comtip_fast.benchmarks.step.pil_loader import PilLoader
from comtip_fast.data.batch import Batch
from comtip_fast.genes.tokens import GeneTokens
from comtip_fast.models import CoMTIP
from comtip_fast.objectives import choose_hardest, counted_swaps, masked_feature_loss, pair_loss, same_text_hash
from comtip_fast.runtime import devices
from comtip_fast.training.task import CoMTIPTask

CHUNK = 1024
"""Sentences whose activations are in memory at a time; few enough that malloc reuses their memory (32 MB per tensor)."""


class Plain(StepContender):
    """The plain step, on a copy of the task's model.

    Raises
    ------
    ValueError
        The config has a setting that the plain step does not implement.
    """

    name = "plain PyTorch"

    def __init__(self, task: CoMTIPTask) -> None:
        super().__init__(task)
        unsupported = {
            "vision.stem": task.model.vision.stem is not None,
            "vision.target=ema": task.model.teacher is not None,
            "loss.paat.context=text": self.config.loss.paat.context != "image",
            "text.gene_vectors": bool(self.config.text.gene_vectors),
        }
        for setting, used in unsupported.items():
            if used:
                raise ValueError(
                    f"comtip bench step: the plain step does not implement {setting}; use its default, or leave plain out of `steps`"
                )
        self.model: CoMTIP = copy.deepcopy(task.model)
        self.update = Updater(self.model, task)
        self._loader = PilLoader(task, self.scheduled())

    @property
    def prepared_ahead(self) -> int:
        """See :attr:`StepContender.prepared_ahead`."""
        return self._loader.prepared_ahead

    def load(self) -> Batch:
        """See :meth:`StepContender.load`."""
        with self.clock.part("loader"):
            return self._loader.batch()

    def train(self, batch: Batch) -> Tensor:
        """See :meth:`StepContender.train`."""
        with devices.autocast(self.config.train.precision, self.device):
            loss = self.loss(batch)
        loss.backward()
        self.clock.end_backward()
        with self.clock.part("optimizer"):
            self.update.step()
        return loss.detach()

    def close(self) -> None:
        """See :meth:`StepContender.close`."""
        self._loader.close()

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch; equal to :meth:`CoMTIPTask.losses` up to rounding."""
        timed, weights = self.clock.wrap, self.config.loss
        visible, hidden = self.task.step._mask(batch, self.model.vision.n_patches)
        tokens, vector = timed(self._full_branch, "vision full")(batch)
        total = vector.new_zeros(())
        if visible is not None and hidden is not None:
            total = total + weights.mfm * timed(self._masked_branch, "vision masked")(batch, tokens, visible, hidden)
        genes, levels = self.task.step._panel_genes(batch), batch.levels.long()
        G, Q = levels.shape[1], self.model.genes.n_levels
        every = torch.arange(Q, device=levels.device).expand(G, Q).T.contiguous()
        table = timed(self._sentences, "table")(genes, every)[0].transpose(0, 1)  # (G, Q, D)
        unit_GQD = F.normalize(table, dim=-1)
        mispaired, counted = timed(self._mispaired, "mispairing")(batch, vector, unit_GQD)
        true = timed(self._sentences, "table")(genes, levels)
        false = timed(self._sentences, "table")(genes, mispaired)
        total = total + weights.nce * timed(self._nce, "InfoNCE")(batch, vector, true, false, mispaired, counted)
        total = total + weights.pair * timed(self._pair, "pair")(vector, true[0], false[0], counted)
        return total + weights.level * timed(self._level, "level")(batch, vector, unit_GQD)

    # -- images -----------------------------------------------------------------------------------------

    def _embedded(self, batch: Batch) -> Tensor:
        """Return the tokens before the blocks, from a convolution over whole tiles."""
        v = self.model.vision
        assert batch.tiles is not None
        x = v.patch_embed((batch.tiles.to(v.pixel_mean.dtype) / 255 - v.pixel_mean) / v.pixel_std)
        B = x.shape[0]
        return v.norm_pre(torch.cat([*v._prefix(B), x + v.positions(None, B)], dim=1))

    def _full_branch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the patch features (B, P, d) and the unit image vectors (B, D)."""
        v = self.model.vision
        x = self._embedded(batch)
        for block in v.blocks:
            x = block(x)
        patches = v.norm(x)[:, v.n_prefix :]
        return patches, F.normalize(self.model.project_image(patches.mean(1)), dim=-1)

    def _masked_branch(self, batch: Batch, full: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Return L_mfm from a pass over all patches whose attention masks the hidden patches."""
        v = self.model.vision
        x = self._embedded(batch)
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        keep[:, v.n_prefix :] = torch.zeros_like(keep[:, v.n_prefix :]).scatter(1, visible, True)
        for block in v.blocks:
            x = block(x, attn_mask=keep[:, None, None, :])
        patches = v.norm(x)[:, v.n_prefix :]
        seen = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))
        target = full.detach().gather(1, hidden[..., None].expand(-1, -1, full.shape[-1]))
        return masked_feature_loss(self.model.generator(seen, hidden), target, self.config.vision.distance)

    # -- sentences --------------------------------------------------------------------------------------

    def _sentences(self, genes: GeneTokens, levels_XG: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projected sentences (X, G, D) of X rows of levels, and their pooling scores (X, G)."""
        X, G = levels_XG.shape
        gene_N = torch.arange(G, device=levels_XG.device).repeat(X)
        rows, scores = [], []
        for gene, level in zip(gene_N.split(CHUNK), levels_XG.flatten().split(CHUNK), strict=True):
            row, score = checkpoint(self._encode, genes, gene, level, use_reentrant=False)
            rows.append(row)
            scores.append(score)
        return torch.cat(rows).view(X, G, -1), torch.cat(scores).view(X, G)

    def _encode(self, genes: GeneTokens, gene_N: Tensor, level_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projected sentences (N, D) of genes and levels, and their pooling scores (N,)."""
        enc = self.model.genes
        ids, length = genes.ids_GT[gene_N], genes.length_G[gene_N]
        slot = torch.arange(ids.shape[1], device=ids.device)
        inside, last = slot < length[:, None], slot == length[:, None] - 1
        kind = torch.where(last, 2, torch.where(slot == 0, 0, 1))
        word = torch.where(last[..., None], F.embedding(level_N, enc.level_Qd)[:, None], F.embedding(ids, enc.token_Vd))
        if enc.identity_Id is not None:
            identity = genes.identity_G[gene_N]
            own = F.embedding(identity, enc.identity_Id) * (identity > 0)[:, None]
            word = word + own[:, None] * (slot == 0)[None, :, None]
        x = enc.norm_in(word + F.embedding(kind, enc.type_3d) + enc.position_Td[: ids.shape[1]])
        for block in enc.blocks:
            x = self._block(block, x, inside[:, None, None, :])
        h = enc.norm_out(x[:, 0])
        return self.model.project_text(h), self.model.pool_query(h).squeeze(-1)

    def _block(self, block: Any, x: Tensor, keep: Tensor) -> Tensor:
        N, T, d = x.shape
        q, k, v = block.qkv(block.norm_attention(x)).view(N, T, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        x = x + block.out(attended.transpose(1, 2).reshape(N, T, d))
        return x + block.mlp(block.norm_mlp(x))

    # -- losses -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _mispaired(self, batch: Batch, vector: Tensor, unit_GQD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mispaired levels (B, G) that the adversary chooses, and which of them count as swaps."""
        step, paat = self.task.step, self.config.loss.paat
        candidates = step._candidates(batch, batch.levels.long())
        counted = counted_swaps(batch.levels.long(), candidates, batch.measured, paat.min_level_shift)
        if paat.adversary == "random" or len(candidates) == 1:
            return candidates[0], counted[0]
        scores = torch.einsum("bd,gqd->bgq", vector, self.model.pair_head(unit_GQD))
        logits = torch.stack([scores.gather(2, c[..., None]).squeeze(-1) for c in candidates])
        best, rows = choose_hardest(logits, counted), torch.arange(vector.shape[0], device=vector.device)
        return candidates[best, rows], counted[best, rows]

    def _pool(self, sentences: tuple[Tensor, Tensor], measured: Tensor) -> Tensor:
        """Return the text vector of each spot, (B, D)."""
        rows, scores = sentences
        # A spot without a measured gene has the zero vector.
        weight = scores.masked_fill(~measured, -torch.inf).softmax(1).nan_to_num(0.0)
        return (weight[..., None] * rows).sum(1)

    def _nce(
        self,
        batch: Batch,
        vector: Tensor,
        true: tuple[Tensor, Tensor],
        false: tuple[Tensor, Tensor],
        mispaired: Tensor,
        counted: Tensor,
    ) -> Tensor:
        """Return InfoNCE of images against true and, with ``hard_columns``, mispaired texts."""
        pool = self.clock.wrap(self._pool, "pooling")
        measured, section, levels = batch.measured, batch.section.long(), batch.levels.long()
        text = pool(true, measured)
        excluded = None
        if self.config.loss.paat.hard_columns:
            text = torch.cat([text, pool(false, measured)])
            levels, measured, section = (torch.cat(p) for p in ((levels, mispaired), (measured,) * 2, (section,) * 2))
            excluded = ~counted.any(1)
        b, text_class = vector.shape[0], same_text_hash(levels, measured)
        return infonce(
            vector,
            text,
            self.model._scale(self.model.log_scale_nce),
            negatives=self.config.align.negatives,
            group_rows=section[:b],
            group_columns=section,
            class_rows=text_class[:b],
            class_columns=text_class,
            weight_B=batch.measured.any(1).to(vector.dtype),
            excluded_further=excluded,
            impl="reference",
        )

    def _pair(self, vector: Tensor, true_BGD: Tensor, false_BGD: Tensor, counted: Tensor) -> Tensor:
        """Return L_pair of true and mispaired sentences in the context of the images."""
        scores = [
            torch.einsum("bd,bgd->bg", vector, self.model.pair_head(F.normalize(rows, dim=-1)))
            for rows in (true_BGD, false_BGD)
        ]
        return pair_loss(scores[0], scores[1], counted)

    def _level(self, batch: Batch, vector: Tensor, unit_GQD: Tensor) -> Tensor:
        """Return L_level of the images against the table."""
        prior = self.task.step.log_prior[batch.panel.long()]
        scale = self.model._scale(self.model.log_scale_level)
        return level_cross_entropy(
            vector, unit_GQD, batch.levels.long(), batch.measured, scale, prior, impl="reference"
        )
