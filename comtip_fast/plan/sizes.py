"""Numbers of spots, genes, tokens, parameters and bytes of a training step, from a config and a model on the meta device.

The symbols are those of docs/method.md and docs/scaling.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from comtip_shards.genes.identifiers import GeneResource
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import nn

from comtip_fast.config.schema import RunConfig
from comtip_fast.genes import GeneTokenizer
from comtip_fast.genes.panel_sizes import TokenSizes, padded_genes
from comtip_fast.models import CoMTIP, ModelSizes
from comtip_fast.models.vit_blocks import timm_type
from comtip_fast.training.freezing import last_frozen_steps

GENE_STRIDE = 23
"""Sentence lengths are estimated on every ``GENE_STRIDE``-th protein-coding gene."""
DEFAULT_GENES = 10_000
"""Number of trained genes if ``genes.per_cohort`` is 0 and none is given."""
PLAIN_BLOCK = [Block, Mlp, Attention]
"""Types of a transformer block, of its MLP and of its attention for which there are formulas."""


class UnknownBlocksError(ValueError):
    """The plan has no costs for the blocks of an image encoder."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Properties of the shard set, which the config does not contain; each is an option of ``comtip plan``."""

    tile_px: int = 224
    """Side of a tile in pixels, S."""
    tile_bytes: float = 30e3
    """Mean bytes of an encoded tile."""
    trained_genes: int | None = None
    """Number of trained genes; None means ``genes.per_cohort``, or :data:`DEFAULT_GENES` if that setting is 0."""
    panel: int | None = None
    """Panel size G; None means the largest: ``panel.max_genes``, or all trained genes if they are fewer."""
    sentence_tokens: float | None = None
    """Mean tokens per sentence; None estimates the mean on the gene names that ship with the package."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises
        ------
        ValueError
            A field is given and not a finite number above 0.
        """
        for name in ("tile_px", "tile_bytes", "trained_genes", "panel", "sentence_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` {value:g}: must be a finite number above 0; leave it out for the default")


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameter counts of one part of the model."""

    name: str
    trained: int
    frozen: int
    """Frozen parameters and elements of buffers."""
    matrices: int
    """Elements of the trained weights of linear layers, attention and convolutions, which autocast copies."""
    tensors: int
    """Number of trained tensors."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a step and of the model."""

    B: int
    S: int
    P: int
    prefix: int
    hidden_patches: int
    patch_inputs: int
    """Input width of the patch embedding: 3 p^2, or the width of a frozen stem's features."""
    has_stem: bool
    loads_tiles: bool
    """Whether a step loads tiles; not if the features of a frozen stem are in memory (``data.stem_features``)."""
    d: int
    depth: int
    heads: int
    mlp: int
    layer_scale: bool
    generator_heads: int
    genes: int
    """Number of trained genes, all of which a validation encodes."""
    G: int
    Q: int
    tokens: float
    """Mean tokens per sentence, E[T]."""
    attended: float
    """Mean number of tokens that a token attends to, E[T^2] / E[T]."""
    longest: int
    """Tokens of the longest sentence."""
    width: int
    """Width of the sentence encoder."""
    text_depth: int
    text_heads: int
    text_attention: str
    """``text.attention``."""
    D: int
    candidates: int
    has_mfm: bool
    one_pass: bool
    """Whether the image encoder can encode all patches and the visible ones in one pass over its blocks."""
    can_fuse: bool
    """Whether the blocks of the image encoder can be fused (``engine.fused_blocks``)."""
    vision_trained: bool
    """Whether any parameter of the image encoder is trained in some step; otherwise it has no backward pass."""
    has_teacher: bool
    has_pair: bool
    has_level: bool
    has_nce: bool
    hard_columns: bool
    other_spots: bool
    """Whether mispaired levels may come from other spots of the section."""
    text_context: bool
    equal_tokens: bool
    """Whether equal tokens of a panel's sentences have equal inputs, so that the first block projects each once."""
    largest_panel: int
    """Most genes of a panel, to which no panel is padded beyond (``panel.max_genes``)."""
    panel_sizes: int
    """``engine.panel_sizes``: sizes per doubling to which a GPU pads panels; 0 pads none."""
    groups: tuple[ParameterGroup, ...]
    tile_bytes: float
    loader: str
    prefetch: int

    @property
    def V(self) -> int:
        """Number of visible patches."""
        return self.P - self.hidden_patches

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(g.trained for g in self.groups)

    @property
    def frozen(self) -> int:
        """Number of frozen parameters and buffer elements."""
        return sum(g.frozen for g in self.groups)

    @property
    def matrices(self) -> int:
        """Number of weight elements that autocast copies."""
        return sum(g.matrices for g in self.groups)

    def trained_in(self, *names: str) -> int:
        """Return the number of trained parameters of the named groups."""
        return sum(g.trained for g in self.groups if g.name in names)

    @property
    def image_side(self) -> int:
        """Number of trained parameters that every micro-batch uses."""
        return self.trained_in("image encoder", "mask generator", "image head")

    @property
    def mispairs(self) -> bool:
        """Whether the step draws mispaired spots."""
        return self.G >= 2 and (self.has_pair or self.hard_columns)

    def at_panel(self, G: int) -> Sizes:
        """Return the sizes of a step with a panel of ``G`` genes."""
        return replace(self, G=G)

    def padded(self, ranks: int) -> Sizes:
        """Return the sizes of a step on a GPU, whose panel is padded as ``engine.panel_sizes`` says.

        ``ranks`` is the number of ranks that share the sentences. Mean and deviation of the tokens of a sentence are those of the
        sizes; the panel is assumed to have no more tokens than a mean one.
        """
        if not self.panel_sizes:
            return self
        G = padded_genes(self.G, self.panel_sizes, self.largest_panel)
        deviation = math.sqrt(max(0.0, self.tokens * (self.attended - self.tokens)))
        rows = math.ceil(G * self.Q / ranks)
        lengths = TokenSizes(self.tokens, deviation, self.longest)
        return replace(self, G=G, tokens=lengths.padded(rows, self.Q, math.floor(rows * self.tokens)) / rows)


@cache
def sentence_lengths(max_tokens: int, full_name: bool) -> tuple[float, float]:
    """Return E[T] and E[T^2] / E[T] of sentence lengths T, estimated on a sample of protein-coding genes of ``comtip_shards``."""
    tokenizer = GeneTokenizer.load()
    proteins = [r for r in GeneResource.load().rows if r.kind == "protein"]
    lengths = [
        2 + len(tokenizer.encode(r.symbol, r.name if full_name else "", max_tokens)) for r in proteins[::GENE_STRIDE]
    ]
    mean = sum(lengths) / len(lengths)
    return mean, sum(n * n for n in lengths) / sum(lengths)


def build_on_meta(config: RunConfig, tile_px: int, trained_genes: int) -> CoMTIP:
    """Build the model of a run on the meta device; no memory is allocated and no weights are read."""
    config = replace(config, vision=replace(config.vision, pretrained=""))
    sizes = ModelSizes(
        tile_px=tile_px,
        n_levels=config.levels.n_levels,
        vocab_size=GeneTokenizer.load().vocab_size,
        n_identities=trained_genes,
        longest=config.text.max_tokens + 2,
    )
    with torch.device("meta"):
        return CoMTIP(config, sizes)


def sizes_of(config: RunConfig, inputs: Inputs | None = None, model: CoMTIP | None = None) -> Sizes:
    """Return the sizes of a run's steps.

    Parameters
    ----------
    config
        The run.
    inputs
        Properties of the data, see :class:`Inputs`.
    model
        The model, if it exists; otherwise it is built on the meta device.

    Raises
    ------
    UnknownBlocksError
        The backbone's blocks are not plain pre-norm blocks.
    """
    inputs = inputs or Inputs()
    genes = inputs.trained_genes or config.genes.per_cohort or DEFAULT_GENES
    model = model or build_on_meta(config, inputs.tile_px, genes)
    E, paat, loss, text = model.vision, config.loss.paat, config.loss, config.text
    block: Any = E.blocks[0]
    if [timm_type(m) for m in (block, getattr(block, "mlp", None), getattr(block, "attn", None))] != PLAIN_BLOCK:
        raise UnknownBlocksError(
            f"vision.backbone={config.vision.backbone}: comtip plan has no costs for its blocks; "
            "plan with a backbone of plain pre-norm blocks, e.g. vit_base_patch32_224"
        )
    frozen = always_frozen(config, model)
    tokens, attended = sentence_lengths(text.max_tokens, text.full_name)
    if inputs.sentence_tokens is not None:
        attended *= inputs.sentence_tokens / tokens
        tokens = inputs.sentence_tokens
    return Sizes(
        B=config.data.batch_size,
        S=inputs.tile_px,
        P=E.n_patches,
        prefix=E.n_prefix,
        hidden_patches=int(config.vision.mask_ratio * E.n_patches),
        patch_inputs=3 * E.patch_px**2 if E.stem is None else E.stem.width,
        has_stem=E.stem is not None,
        loads_tiles=E.stem is None or config.data.stem_features == "batch",
        d=E.width,
        depth=len(E.blocks),
        heads=block.attn.num_heads,
        mlp=block.mlp.fc1.out_features,
        layer_scale=not isinstance(block.ls1, nn.Identity),
        generator_heads=config.vision.heads,
        genes=genes,
        G=inputs.panel or min(config.panel.max_genes, genes),
        Q=config.levels.n_levels,
        tokens=tokens,
        attended=attended,
        longest=text.max_tokens + 2,
        width=text.width,
        text_depth=text.depth,
        text_heads=text.heads,
        text_attention=text.attention,
        D=config.align.dim,
        candidates=paat.candidates if paat.adversary == "hard" else 1,
        has_mfm=loss.mfm > 0,
        one_pass=E.takes_parts,
        can_fuse=E.can_fuse,
        vision_trained=any(p.requires_grad and f"vision.{n}" not in frozen for n, p in E.named_parameters()),
        has_teacher=model.teacher is not None,
        has_pair=loss.pair > 0,
        has_level=loss.level > 0,
        has_nce=loss.nce > 0,
        hard_columns=paat.hard_columns,
        other_spots=paat.mode != "strata",
        text_context=paat.context == "text",
        equal_tokens=not text.gene_vectors,
        largest_panel=config.panel.max_genes,
        panel_sizes=config.engine.panel_sizes,
        groups=parameter_groups(model, frozen),
        tile_bytes=inputs.tile_bytes,
        loader=config.data.loader,
        prefetch=config.data.prefetch,
    )


def mean_panel(smallest: int, largest: int) -> int:
    """Return the mean, rounded, of the log-uniform panel size on ``[smallest, largest]``."""
    if smallest == largest:
        return largest
    return round((largest + 1 - smallest) / math.log((largest + 1) / smallest))


PARTS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("image encoder", ("vision",)),
    ("mask generator", ("generator",)),
    ("gene encoder", ("genes",)),
    ("image head", ("project_image",)),
    ("text heads", ("project_text", "pool_query", "pair_head")),
    ("teacher", ("teacher",)),
)


def always_frozen(config: RunConfig, model: nn.Module) -> set[str]:
    """Return the names of the parameters that ``optim.freeze`` freezes in all steps; the plan counts later thaws as trained."""
    names = [name for name, _ in model.named_parameters()]
    return {name for name, last in last_frozen_steps(names, config.optim.freeze).items() if last == 0}


def parameter_groups(model: nn.Module, frozen: Collection[str] = ()) -> tuple[ParameterGroup, ...]:
    """Count all parameters and buffers by part of the model; parts without any are left out.

    The temperatures of InfoNCE and L_level belong to the text heads.

    Parameters
    ----------
    model
        The model; parameters without ``requires_grad`` count as frozen.
    frozen
        Names of further frozen parameters.
    """
    part_of = {child: name for name, children in PARTS for child in children}
    counts: dict[str, list[int]] = {name: [0, 0, 0, 0] for name, _ in PARTS}
    operands = {
        f"{name}.{weight}"
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d | nn.MultiheadAttention)
        for weight in ("weight", "in_proj_weight")
    }
    for name, p in model.named_parameters():
        row = counts[part_of.get(name.split(".")[0], "text heads")]
        if p.requires_grad and name not in frozen:
            row[0] += p.numel()
            row[2] += p.numel() if name in operands else 0
            row[3] += 1
        else:
            row[1] += p.numel()
    for name, b in model.named_buffers():
        counts[part_of.get(name.split(".")[0], "text heads")][1] += b.numel()
    return tuple(
        ParameterGroup(name=name, trained=t, frozen=f, matrices=m, tensors=k)
        for name, (t, f, m, k) in counts.items()
        if t or f
    )
