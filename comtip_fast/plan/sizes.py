"""The numbers a plan is made of, from the config alone: the model is built for real, on the meta device, without memory.

Symbols are those of docs/method.md and docs/scaling.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from comtip_fast.models import CoMTIP, ModelSizes

EVERY = 23
"""One gene in so many is tokenised to find how long sentences are."""
DEFAULT_GENES = 10_000
"""Trained genes where ``genes.per_cohort`` is 0 and nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the config cannot know: facts of the shard set. Each is an option of ``comtip plan``."""

    tile_px: int = 224
    """S."""
    tile_bytes: float = 30e3
    """Bytes of one encoded tile in a shard."""
    trained_genes: int | None = None
    """Genes with a row of their own; None takes ``genes.per_cohort``."""
    panel: int | None = None
    """G; None takes ``panel.max_genes``, the largest step."""
    sentence_tokens: float | None = None
    """Mean tokens of a sentence; None measures it on the shipped gene names."""


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters of one part."""

    name: str
    trained: int
    frozen: int
    matrices: int
    """Elements of the weights of linear maps and convolutions, of those trained: what autocast copies."""
    tensors: int
    """Trained tensors."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of one step and of the model it is for."""

    B: int
    S: int
    P: int
    prefix: int
    hidden_patches: int
    patch_inputs: int
    """Numbers that a patch's embedding reads: 3 p^2, or the width of a frozen stem's features."""
    has_stem: bool
    d: int
    depth: int
    heads: int
    mlp: int
    layer_scale: bool
    generator_heads: int
    G: int
    Q: int
    tokens: float
    """Mean tokens of a sentence."""
    reach: float
    """Mean tokens that a token attends to: E[T^2] / E[T]."""
    longest: int
    width: int
    """d of the sentence encoder."""
    text_depth: int
    text_heads: int
    D: int
    candidates: int
    has_mfm: bool
    has_teacher: bool
    has_pair: bool
    has_level: bool
    has_nce: bool
    hard_columns: bool
    other_spots: bool
    """Mispaired levels may come from other spots of the section."""
    text_context: bool
    groups: tuple[ParameterGroup, ...]
    tile_bytes: float
    loader: str
    prefetch: int

    @property
    def V(self) -> int:
        """Visible patches."""
        return self.P - self.hidden_patches

    @property
    def trained(self) -> int:
        """Psi, parameters with gradients."""
        return sum(g.trained for g in self.groups)

    @property
    def frozen(self) -> int:
        """Parameters and buffers without."""
        return sum(g.frozen for g in self.groups)

    @property
    def matrices(self) -> int:
        """Elements that autocast copies."""
        return sum(g.matrices for g in self.groups)

    def trained_in(self, *names: str) -> int:
        """Return the parameters with gradients of some groups."""
        return sum(g.trained for g in self.groups if g.name in names)

    @property
    def image_side(self) -> int:
        """Parameters with gradients that every micro-batch goes through."""
        return self.trained_in("image encoder", "mask generator", "image head")

    @property
    def mispairs(self) -> bool:
        """The step makes mispaired spots."""
        return self.G >= 2 and (self.has_pair or self.hard_columns)

    def at_panel(self, G: int) -> Sizes:
        """Return the sizes of a step with another panel."""
        return replace(self, G=G)


@cache
def sentence_lengths(max_tokens: int, full_name: bool) -> tuple[float, float]:
    """Return the mean tokens of a sentence and E[T^2] / E[T], over protein genes that ship with ``comtip_shards``."""
    tokenizer = GeneTokenizer.load()
    proteins = [r for r in GeneResource.load().rows if r["kind"] == "protein"]
    lengths = [
        2 + len(tokenizer.encode(r["symbol"], r["name"] if full_name else "", max_tokens)) for r in proteins[::EVERY]
    ]
    mean = sum(lengths) / len(lengths)
    return mean, sum(n * n for n in lengths) / sum(lengths)


def build_on_meta(config: RunConfig, tile_px: int, trained_genes: int) -> CoMTIP:
    """Build the model as training would, with shapes but no memory and no weights read."""
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
    """Work out the sizes of a run's steps.

    Parameters
    ----------
    config
        The run.
    inputs
        Facts of the data; see :class:`Inputs`.
    model
        The model where it exists already; else it is built on the meta device.

    Raises
    ------
    ValueError
        The backbone's blocks are not the ones whose costs are known.
    """
    given = inputs or Inputs()
    genes = given.trained_genes or config.genes.per_cohort or DEFAULT_GENES
    model = model or build_on_meta(config, given.tile_px, genes)
    E, paat, loss, text = model.vision, config.loss.paat, config.loss, config.text
    block: Any = E.blocks[0]
    if [type(m) for m in (block, getattr(block, "mlp", None), getattr(block, "attn", None))] != [Block, Mlp, Attention]:
        raise ValueError(
            f"vision.backbone {config.vision.backbone!r}: comtip plan knows plain pre-norm blocks, not these"
        )
    tokens, reach = sentence_lengths(text.max_tokens, text.full_name)
    if given.sentence_tokens is not None:
        reach *= given.sentence_tokens / tokens
        tokens = given.sentence_tokens
    return Sizes(
        B=config.data.batch_size,
        S=given.tile_px,
        P=E.n_patches,
        prefix=E.n_prefix,
        hidden_patches=int(config.vision.mask_ratio * E.n_patches),
        patch_inputs=3 * E.patch_px**2 if E.stem is None else E.stem.width,
        has_stem=E.stem is not None,
        d=E.width,
        depth=len(E.blocks),
        heads=block.attn.num_heads,
        mlp=block.mlp.fc1.out_features,
        layer_scale=not isinstance(block.ls1, nn.Identity),
        generator_heads=config.vision.heads,
        G=given.panel or min(config.panel.max_genes, genes),
        Q=config.levels.n_levels,
        tokens=tokens,
        reach=reach,
        longest=text.max_tokens + 2,
        width=text.width,
        text_depth=text.depth,
        text_heads=text.heads,
        D=config.align.dim,
        candidates=paat.candidates if paat.adversary == "hard" else 1,
        has_mfm=loss.mfm > 0,
        has_teacher=model.teacher is not None,
        has_pair=loss.pair > 0,
        has_level=loss.level > 0,
        has_nce=loss.nce > 0,
        hard_columns=paat.hard_columns,
        other_spots=paat.mode != "strata",
        text_context=paat.context == "text",
        groups=parameter_groups(model),
        tile_bytes=given.tile_bytes,
        loader=config.data.loader,
        prefetch=config.data.prefetch,
    )


def mean_panel(least: int, most: int) -> int:
    """Return the mean of the log-uniform panel, G drawn from ``[least, most]``."""
    if least == most:
        return most
    return round((most + 1 - least) / math.log((most + 1) / least))


PARTS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("image encoder", ("vision",)),
    ("mask generator", ("generator",)),
    ("gene encoder", ("genes",)),
    ("image head", ("project_image",)),
    ("text heads", ("project_text", "pool_query", "pair_head")),
    ("teacher", ("teacher",)),
)


def parameter_groups(model: nn.Module) -> tuple[ParameterGroup, ...]:
    """Count every parameter and buffer once, by part; the two temperatures go with the text's heads."""
    of = {child: name for name, children in PARTS for child in children}
    found: dict[str, list[int]] = {name: [0, 0, 0, 0] for name, _ in PARTS}
    operands = {
        f"{name}.{own}"
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d | nn.MultiheadAttention)
        for own in ("weight", "in_proj_weight")
    }
    for name, p in model.named_parameters():
        row = found[of.get(name.split(".")[0], "text heads")]
        if p.requires_grad:
            row[0] += p.numel()
            row[2] += p.numel() if name in operands else 0
            row[3] += 1
        else:
            row[1] += p.numel()
    for name, b in model.named_buffers():
        found[of.get(name.split(".")[0], "text heads")][1] += b.numel()
    return tuple(
        ParameterGroup(name=name, trained=t, frozen=f, matrices=m, tensors=k)
        for name, (t, f, m, k) in found.items()
        if t or f
    )
