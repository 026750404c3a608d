"""CoMTIP as one module that knows one device: tiles and gene sentences in, vectors of the shared space out.

Shapes: B spots, P patches, V visible, K hidden, G genes of the step panel, Q levels, D the shared width.
Losses are not here (see :mod:`comtip_fast.objectives`): this module only turns inputs into vectors.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comtip_fast.config.schema import RunConfig
from comtip_fast.models.gene_encoder import GeneEncoder, GeneTokens
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


@dataclass
class ImageOutput:
    """One tile in the shared space."""

    vector_BD: Tensor
    """Unit vector z."""
    pooled_Bd: Tensor
    """Mean patch feature of the full branch, before projection."""
    patches_BPd: Tensor
    """Z, the full branch's patch features."""


@dataclass
class SentenceTable:
    """The distinct sentences of a step in the shared space."""

    rows_GQD: Tensor
    """Projected h(g, q), any length: what pooling sums."""
    unit_GQD: Tensor
    """The same rows at length 1: what L_level and prediction compare with an image."""
    scores_GQ: Tensor
    """Pooling scores."""
    pair_GQD: Tensor
    """Rows times the pair head's bilinear form, scaled: a dot product with a context is a logit."""


@dataclass
class StepOutput:
    """Everything the losses read."""

    image: ImageOutput
    table: SentenceTable
    predicted_BKd: Tensor | None
    """Predicted features of the hidden patches; None without MFM."""
    target_BKd: Tensor | None
    """The full branch's features there, detached."""
    scale_nce: Tensor
    """InfoNCE's inverse temperature, clamped."""
    scale_level: Tensor
    """L_level's inverse temperature, clamped."""


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
        self.log_scale = nn.Parameter(torch.tensor(math.log(5.0)))

    def forward(self, unit_GQD: Tensor) -> Tensor:
        """Return scale * W^T h for every row of the table."""
        return self.form(unit_GQD) * self.log_scale.clamp(max=math.log(50.0)).exp()


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
        self.log_scale_nce = nn.Parameter(torch.tensor(math.log(1 / config.align.temperature)))
        self.log_scale_level = nn.Parameter(torch.tensor(math.log(10.0)))
        self.teacher: VisionEncoder | None = None
        if config.vision.target == "ema":
            self.teacher = copy.deepcopy(self.vision).requires_grad_(False)

    def forward(
        self, features_BP: Tensor, visible_BV: Tensor | None, hidden_BK: Tensor | None, genes: GeneTokens
    ) -> StepOutput:
        """One training pass over B tiles and the panel's sentence table.

        Parameters
        ----------
        features_BP
            ``vision.stem_features(tiles)``.
        visible_BV, hidden_BK
            Patch numbers of the masked branch, int64; None turns MFM off.
        genes
            Tokens of the panel's G genes.
        """
        image = self.encode_image(features_BP)
        predicted = target = None
        if visible_BV is not None and hidden_BK is not None:
            seen = self.vision(features_BP, visible_BV)
            predicted = self.generator(seen.patches_BVd, hidden_BK)
            target = self._target(features_BP, image, hidden_BK)
        return StepOutput(
            image, self.sentence_table(genes), predicted, target,
            self._scale(self.log_scale_nce), self._scale(self.log_scale_level),
        )  # fmt: skip

    def encode_image(self, features_BP: Tensor) -> ImageOutput:
        """Full branch: all P patches, pooled and projected."""
        tokens = self.vision(features_BP)
        vector_BD = F.normalize(self.project_image(tokens.pooled_Bd), dim=-1)
        return ImageOutput(vector_BD, tokens.pooled_Bd, tokens.patches_BVd)

    def sentence_table(self, genes: GeneTokens) -> SentenceTable:
        """Encode each distinct (gene, level) of the panel once and project it."""
        h_GQd = self.genes(genes)
        rows_GQD = self.project_text(h_GQd)
        unit_GQD = F.normalize(rows_GQD, dim=-1)
        return SentenceTable(rows_GQD, unit_GQD, self.pool_query(h_GQd).squeeze(-1), self.pair_head(unit_GQD))

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
        return log_scale.clamp(max=self.max_log_scale).exp()
