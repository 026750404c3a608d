"""CoMTIP as one module that knows one device: tiles and gene sentences in, vectors of the shared space out.

Shapes: B spots, P patches, V visible, K hidden, G genes of the step panel, Q levels, D the shared width.
Losses are not here (see :mod:`comtip_fast.objectives`): this module only turns inputs into vectors. What modules return are
tuples with names: ZeRO 3 looks for the tensors in a module's output, and looks into tuples, lists and dicts only.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comtip_fast.collectives import Group, counts_of, gather_rows, share_of
from comtip_fast.config.schema import RunConfig
from comtip_fast.genes.tokens import GeneTokens
from comtip_fast.models.gene_encoder import GeneEncoder
from comtip_fast.models.image_encoder import VisionEncoder
from comtip_fast.models.mask_generator import MaskFeatureGenerator


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What the model has to know about the data it is built for; saved with the weights."""

    tile_px: int
    """S."""
    n_levels: int
    """Q."""
    vocab_size: int
    """Rows of the token table."""
    n_identities: int
    """Genes of training with a row of their own."""
    longest: int
    """Slots of the longest gene sentence, both special ones included."""


class ImageOutput(NamedTuple):
    """One tile in the shared space."""

    vector_BD: Tensor
    """Unit vector z."""
    pooled_Bd: Tensor
    """Mean patch feature of the full branch, before projection."""
    patches_BPd: Tensor
    """Z, the full branch's patch features."""


class SentenceTable(NamedTuple):
    """The distinct sentences of a step in the shared space."""

    rows_GQD: Tensor
    """Projected h(g, q), any length: what pooling sums."""
    unit_GQD: Tensor
    """The same rows at length 1: what L_level and prediction compare with an image."""
    scores_GQ: Tensor
    """Pooling scores."""
    pair_GQD: Tensor
    """Rows times the pair head's bilinear form, scaled: a dot product with a context is a logit."""


class StepOutput(NamedTuple):
    """Everything the losses read."""

    image: ImageOutput
    table: SentenceTable | None
    """None where it was not asked for."""
    predicted_BKd: Tensor | None
    """Predicted features of the hidden patches; None without MFM."""
    target_BKd: Tensor | None
    """The full branch's features there, detached."""
    scale_nce: Tensor
    """InfoNCE's inverse temperature, clamped."""
    scale_level: Tensor
    """L_level's inverse temperature, clamped."""


def _one_number(value: float) -> nn.Parameter:
    """Return a parameter of shape (1,): ZeRO shards no parameter without a dimension."""
    return nn.Parameter(torch.tensor([value]))


def _give_scalars_a_dimension(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Let weights of version 0.1, whose temperatures had the shape (), be loaded."""
    for name in ("log_scale_nce", "log_scale_level", "pair_head.log_scale"):
        if prefix + name in state:
            state[prefix + name] = state[prefix + name].reshape(1)


class Projection(nn.Module):
    """Two-layer head from an encoder's width into the shared space."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.skip = nn.Linear(width, dim)
        self.deep = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., dim)."""
        return self.skip(x) + self.deep(x)


class PairHead(nn.Module):
    """Bilinear judge of a sentence in a context: c^T W h, with a learnt scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.form = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.form.weight)
        self.log_scale = _one_number(math.log(5.0))

    def forward(self, unit_GQD: Tensor) -> Tensor:
        """Return scale * W^T h for every row of the table."""
        # Of shape (), so that a table in bf16 stays one.
        return self.form(unit_GQD) * self.log_scale.clamp(max=math.log(50.0)).exp().squeeze(0)


class CoMTIP(nn.Module):
    """Image encoder, mask feature generator, gene-sentence encoder and the heads into the shared space."""

    def __init__(self, config: RunConfig, sizes: ModelSizes) -> None:
        super().__init__()
        D = config.align.dim
        self.vision = VisionEncoder(config.vision, sizes.tile_px)
        self.generator = MaskFeatureGenerator(self.vision.width, config.vision.heads, self.vision.n_patches)
        self.genes = GeneEncoder(config.text, sizes.n_levels, sizes.vocab_size, sizes.n_identities, sizes.longest)
        self.project_image, self.project_text = Projection(self.vision.width, D), Projection(config.text.width, D)
        self.pool_query = nn.Linear(config.text.width, 1, bias=False)
        self.pair_head = PairHead(D)
        self.max_log_scale = math.log(config.align.max_scale)
        self.log_scale_nce = _one_number(math.log(1 / config.align.temperature))
        self.log_scale_level = _one_number(math.log(10.0))
        self.register_load_state_dict_pre_hook(_give_scalars_a_dimension)
        self.vision.recompute = self.genes.recompute = config.engine.activation_checkpointing
        if config.loss.mfm <= 0:
            # What no loss reaches is no parameter to train: weight decay must not move it, in any engine.
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
        """One training pass over B tiles and the panel's sentence table.

        Parameters
        ----------
        features_BP
            ``vision.stem_features(tiles)``.
        visible_BV, hidden_BK
            Patch numbers of the masked branch, int64; None turns MFM off.
        genes
            Tokens of the panel's G genes; None leaves the table out.
        group
            Ranks that share the table's encoding; None encodes all of it here.
        """
        image = self.encode_image(features_BP)
        predicted = target = None
        if visible_BV is not None and hidden_BK is not None:
            seen = self.vision(features_BP, visible_BV)
            predicted = self.generator(seen.patches_BVd, hidden_BK)
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
        """Full branch: all P patches, pooled and projected."""
        tokens = self.vision(features_BP)
        vector_BD = F.normalize(self.project_image(tokens.pooled_Bd), dim=-1)
        return ImageOutput(vector_BD, tokens.pooled_Bd, tokens.patches_BVd)

    def sentence_table(self, genes: GeneTokens, group: Group | None = None) -> SentenceTable:
        """Encode each distinct (gene, level) of the panel once, each rank its share of them, and project it."""
        G, Q = genes.length_G.shape[0], self.genes.n_levels
        # Fewer sentences than ranks cost little, and no rank may be left without any.
        if group is None or group.size == 1 or group.size > G * Q:
            rows_ND, scores_N = self._rows_and_scores(genes, slice(0, G * Q))
        else:
            rows, scores = self._rows_and_scores(genes, share_of(G * Q, group.rank, group.size))
            both = torch.cat([rows, scores[:, None].to(rows.dtype)], dim=-1)
            both = gather_rows(both, group, counts_of(G * Q, group.size))
            rows_ND, scores_N = both[:, :-1], both[:, -1]
        rows_GQD = rows_ND.view(G, Q, -1)
        unit_GQD = F.normalize(rows_GQD, dim=-1)
        return SentenceTable(rows_GQD, unit_GQD, scores_N.view(G, Q), self.pair_head(unit_GQD))

    def _rows_and_scores(self, genes: GeneTokens, sentences: slice) -> tuple[Tensor, Tensor]:
        h_Nd = self.genes(genes, sentences)
        return self.project_text(h_Nd), self.pool_query(h_Nd).squeeze(-1)

    def compile_blocks(self) -> None:
        """Compile both encoders' blocks with ``torch.compile``, in place; shapes that change compile once more."""
        for block in (*self.vision.blocks, *self.genes.blocks):
            block.compile()

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """Move the EMA teacher towards the encoder; nothing without a teacher."""
        if self.teacher is None:
            return
        for slow, fast in zip(self.teacher.parameters(), self.vision.parameters(), strict=True):
            slow.lerp_(fast.to(slow.dtype), 1 - decay)

    @torch.no_grad()
    def _target(self, features_BP: Tensor, image: ImageOutput, hidden_BK: Tensor) -> Tensor:
        full_BPd = image.patches_BPd.detach() if self.teacher is None else self.teacher(features_BP).patches_BVd
        rows = torch.arange(full_BPd.shape[0], device=full_BPd.device)[:, None]
        return full_BPd[rows, hidden_BK]

    def _scale(self, log_scale: Tensor) -> Tensor:
        return log_scale.clamp(max=self.max_log_scale).exp().reshape(())
