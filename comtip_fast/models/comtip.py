"""The CoMTIP model, which maps tiles and gene sentences to vectors in the shared space.

Shapes: B spots, P patches, V visible patches, K hidden patches, G genes drawn for the step (the panel), Q levels, D the shared width.
Losses are in :mod:`comtip_fast.objectives`. Modules return named tuples, because ZeRO 3 finds the tensors of a module's
output only in tuples, lists and dicts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from comtip_kernels.dispatch import runs_kernels
from torch import Tensor, nn
from torch.nn import functional as F

from comtip_fast.collectives import Group, counts_of, gather_rows, share_of
from comtip_fast.config.schema import EngineConfig, RunConfig
from comtip_fast.genes.tokens import GeneTokens
from comtip_fast.models.gene_encoder import GeneEncoder
from comtip_fast.models.image_encoder import ImageTokens, VisionEncoder
from comtip_fast.models.mask_generator import MaskFeatureGenerator


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of the model that depend on the data; saved with the weights."""

    tile_px: int
    """Width of a tile in px, S."""
    n_levels: int
    """Number of expression levels, Q."""
    vocab_size: int
    """Number of token ids of the tokenizer."""
    n_identities: int
    """Number of trained genes, each with a row of the identity table."""
    longest: int
    """Largest number of tokens of a gene sentence, including ``[GENE]`` and ``[VALUE]``."""
    vector_dim: int = 0
    """Number of components of a gene vector; 0 for a model without gene vectors."""


class ImageOutput(NamedTuple):
    """Output of the image encoder for B tiles."""

    vector_BD: Tensor
    """Unit vectors z."""
    pooled_Bd: Tensor
    """Mean patch feature of the full branch, before projection."""
    patches_BPd: Tensor
    """Patch features of the full branch, Z."""


class SentenceTable(NamedTuple):
    """Vectors of all (gene, level) sentences of a panel in the shared space."""

    rows_GQD: Tensor
    """Projected h(g, q), not normalised, which pooling sums."""
    unit_GQD: Tensor
    """``rows_GQD`` at unit length, with which L_level and prediction compare images."""
    scores_GQ: Tensor
    """Pooling scores: the softmax over a spot's measured genes gives their weights."""
    pair_GQD: Tensor
    """``unit_GQD`` times the bilinear form and scale of the pair head; the dot product with a context vector is a logit."""


class StepOutput(NamedTuple):
    """Output of the model in a training step, the input of the losses."""

    image: ImageOutput
    table: SentenceTable | None
    """None if no genes were given."""
    predicted_BKd: Tensor | None
    """Predicted features of the hidden patches; None without masked feature modelling."""
    target_BKd: Tensor | None
    """Features of the hidden patches from the full branch or the teacher, detached; None without masked feature modelling."""
    scale_nce: Tensor
    """Inverse temperature of InfoNCE, clamped."""
    scale_level: Tensor
    """Inverse temperature of L_level, clamped."""


def _scalar_parameter(value: float) -> nn.Parameter:
    """Return a parameter of shape (1,); ZeRO cannot shard a parameter of shape ()."""
    return nn.Parameter(torch.tensor([value]))


def reshape_scalars(state: dict[str, Tensor], prefix: str = "") -> None:
    """Reshape the scalars of weights of version 0.1, which have shape (); ``state`` is changed in place."""
    for name in ("log_scale_nce", "log_scale_level", "pair_head.log_scale"):
        if prefix + name in state and state[prefix + name].ndim == 0:
            state[prefix + name] = state[prefix + name].reshape(1)


def _reshape(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Reshape the scalars of earlier versions when they are loaded."""
    reshape_scalars(state, prefix)


class Projection(nn.Module):
    """Projection from an encoder's width to the shared space: the sum of a linear layer and a two-layer MLP."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.skip = nn.Linear(width, dim)
        self.deep = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection of ``x``, (..., dim)."""
        return self.skip(x) + self.deep(x)


class PairHead(nn.Module):
    """Pair head: bilinear score c^T W h of a sentence h in a context c, with a learnable scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.form = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.form.weight)
        self.log_scale = _scalar_parameter(math.log(5.0))

    def forward(self, unit_GQD: Tensor) -> Tensor:
        """Return scale * W h for every row of the table, (G, Q, D)."""
        # A scale of shape (1,) would promote a bf16 table to fp32.
        return self.form(unit_GQD) * self.log_scale.clamp(max=math.log(50.0)).exp().squeeze(0)


class CoMTIP(nn.Module):
    """The CoMTIP model: image encoder, mask feature generator, gene-sentence encoder, projections and pair head."""

    def __init__(self, config: RunConfig, sizes: ModelSizes) -> None:
        super().__init__()
        D = config.align.dim
        self.vision = VisionEncoder(config.vision, sizes.tile_px)
        self.generator = MaskFeatureGenerator(self.vision.width, config.vision.heads, self.vision.n_patches)
        self.genes = GeneEncoder(
            config.text, sizes.n_levels, sizes.vocab_size, sizes.n_identities, sizes.longest, sizes.vector_dim
        )
        self.project_image, self.project_text = Projection(self.vision.width, D), Projection(config.text.width, D)
        self.pool_query = nn.Linear(config.text.width, 1, bias=False)
        self.pair_head = PairHead(D)
        self.max_log_scale = math.log(config.align.max_scale)
        self.log_scale_nce = _scalar_parameter(math.log(1 / config.align.temperature))
        self.log_scale_level = _scalar_parameter(math.log(10.0))
        self.register_load_state_dict_pre_hook(_reshape)
        self.vision.recompute = self.genes.recompute = config.engine.activation_checkpointing
        if config.loss.mfm <= 0:
            # Without MFM, no loss depends on the generator; it is frozen so that weight decay does not change it.
            self.generator.requires_grad_(False)
        self.teacher: VisionEncoder | None = None
        if config.vision.target == "ema":
            self.teacher = copy.deepcopy(self.vision).requires_grad_(False)

    def forward(
        self,
        features_BP: Tensor,
        visible_BV: Tensor | None,
        hidden_BK: Tensor | None,
        genes: GeneTokens | None,
        group: Group | None = None,
    ) -> StepOutput:
        """Encode B tiles and, with ``genes``, the sentence table of a panel.

        Parameters
        ----------
        features_BP
            Result of ``vision.stem_features(tiles)``.
        visible_BV, hidden_BK
            int64 patch indices of the masked branch; None skips it.
        genes
            Tokens of the panel's G genes; None skips the table.
        group
            Ranks that share the encoding of the table; None encodes the full table on this rank.
        """
        predicted = target = None
        if visible_BV is None or hidden_BK is None:
            image = self.encode_image(features_BP)
        else:
            full, visible = self.vision.encode_both(features_BP, visible_BV)
            image = self.project_tokens(full)
            predicted = self.generator(visible.patches_BVd, hidden_BK)
            target = self._target(features_BP, image, hidden_BK)
        return StepOutput(
            image,
            None if genes is None else self.sentence_table(genes, group),
            predicted,
            target,
            self._scale(self.log_scale_nce),
            self._scale(self.log_scale_level),
        )

    def encode_image(self, features_BP: Tensor) -> ImageOutput:
        """Encode all P patches (full branch), pool their features and project them to the shared space."""
        return self.project_tokens(self.vision(features_BP))

    def project_tokens(self, tokens: ImageTokens) -> ImageOutput:
        """Project the pooled features to the shared space, and return them with the features of the patches."""
        vector_BD = F.normalize(self.project_image(tokens.pooled_Bd), dim=-1)
        return ImageOutput(vector_BD, tokens.pooled_Bd, tokens.patches_BVd)

    def sentence_table(self, genes: GeneTokens, group: Group | None = None) -> SentenceTable:
        """Encode and project each (gene, level) of the panel once; with a group, each rank encodes a share of them."""
        G, Q = genes.length_G.shape[0], self.genes.n_levels
        # With fewer sentences than ranks, every rank encodes all of them, because no rank's share may be empty.
        if group is None or group.size == 1 or group.size > G * Q:
            rows_ND, scores_N = self._rows_and_scores(genes, slice(0, G * Q))
        else:
            counts = counts_of(G * Q, group.size)
            rows, scores = self._rows_and_scores(genes, share_of(G * Q, group.rank, group.size), counts)
            packed = torch.cat([rows, scores[:, None].to(rows.dtype)], dim=-1)
            packed = gather_rows(packed, group, counts)
            # A row of D + 1 elements begins at an odd address: kernels would load it element by element.
            rows_ND, scores_N = packed[:, :-1].contiguous(), packed[:, -1]
        rows_GQD = rows_ND.view(G, Q, -1)
        unit_GQD = F.normalize(rows_GQD, dim=-1)
        return SentenceTable(rows_GQD, unit_GQD, scores_N.view(G, Q), self.pair_head(unit_GQD))

    def _rows_and_scores(
        self, genes: GeneTokens, sentences: slice, counts: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return projected rows (N, D) and pooling scores (N,) of a slice of the sentences.

        ``counts`` has the number of sentences of each rank.
        """
        h_Nd = self.genes(genes, sentences, counts)
        return self.project_text(h_Nd), self.pool_query(h_Nd).squeeze(-1)

    def compile_blocks(self) -> None:
        """Compile the blocks of both encoders with ``torch.compile``, in place.

        A block is compiled once for all sizes in each gradient mode, see :func:`comtip_fast.models.recompute.run_block`.
        """
        for block in self.transformer_blocks():
            block.compile()

    def fuse_blocks(self, engine: EngineConfig, device: torch.device, *, trains: bool = True) -> None:
        """Fuse the blocks of both encoders in place (:mod:`comtip_fast.models.fused_blocks`), where the kernels for it run.

        An image encoder with other blocks does not change. ZeRO 3 makes the weights of a linear layer or norm available when that
        module is called, which a fused block does not do.

        Parameters
        ----------
        engine
            Engine of the run; ``fused_blocks`` turns this on.
        device
            Device of the model.
        trains
            Whether the engine trains this model; inference with the weights of any engine is not sharded.
        """
        shards_weights = trains and engine.kind == "deepspeed" and engine.zero_stage == 3
        if not engine.fused_blocks or shards_weights or not runs_kernels(device):
            return
        self.genes.fuse()
        for encoder in (self.vision, self.teacher):
            if isinstance(encoder, VisionEncoder):
                encoder.fuse()

    def transformer_blocks(self) -> list[nn.Module]:
        """Return the transformer blocks of both encoders."""
        return [*self.vision.blocks, *self.genes.blocks]

    @torch.no_grad()
    def update_teacher(self, decay: float, good: Tensor | None = None) -> None:
        """Update the EMA teacher from the encoder; without a teacher, do nothing.

        Parameters
        ----------
        decay
            Weight of the previous teacher in the moving average.
        good
            bool scalar on the device of the weights; if False, the teacher does not change. None always updates it.
        """
        if self.teacher is None:
            return
        share: float | Tensor = 1 - decay if good is None else (1 - decay) * good
        for teacher, student in zip(self.teacher.parameters(), self.vision.parameters(), strict=True):
            teacher.lerp_(student.to(teacher.dtype), share)

    @torch.no_grad()
    def _target(self, features_BP: Tensor, image: ImageOutput, hidden_BK: Tensor) -> Tensor:
        """Return the features (B, K, d) of the hidden patches from the full branch or the teacher, detached."""
        full_BPd = image.patches_BPd.detach() if self.teacher is None else self.teacher(features_BP).patches_BVd
        rows = torch.arange(full_BPd.shape[0], device=full_BPd.device)[:, None]
        return full_BPd[rows, hidden_BK]

    def _scale(self, log_scale: Tensor) -> Tensor:
        """Return the inverse temperature, clamped to ``align.max_scale``, as a scalar."""
        return log_scale.clamp(max=self.max_log_scale).exp().reshape(())
