"""Blocks of timm's Vision Transformer that process all patches and, separately, the visible patches of a batch in one call.

The rows of both parts are concatenated. Norms, linear layers and residual sums process all rows together. Attention computes q, k
and v of all rows together, and then processes each part separately, with its own norms and its output projection. All other weights
are read once, and have one gradient. This is the only module that depends on what a block of timm computes; parameters keep timm's
names.

Shapes: B tiles, T tokens of a part per tile, N = B * (sum of T) rows, d the width, H heads of E channels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import Attention, GluMlp, LayerNorm, LayerScale, Mlp, RmsNorm, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

TESTED = (1, 0, 31)
"""Newest release of timm that the tests ran with. ``pyproject.toml`` has the oldest."""
_BLOCK = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_ATTENTION = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
_NORMS = (nn.LayerNorm, LayerNorm, RmsNorm, nn.Identity)


class PartsAttention(Attention):
    """Attention of timm, computed separately within each part of the rows."""

    def forward(  # type: ignore[override]
        self, x: Tensor, tokens: Sequence[int] | None = None, **options: Any
    ) -> Tensor:
        """Return the attention of sequences (B, T, d) or, if ``tokens`` states each part's tokens per tile, of rows (N, d)."""
        if tokens is None:
            out: Tensor = super().forward(x, **options)  # timm's block passes options
            return out
        rows = [x.shape[0] // sum(tokens) * T for T in tokens]
        gate = getattr(self, "gate", None)
        gates = [None] * len(rows) if gate is None else gate(x).sigmoid().split(rows)
        # Parts are split before q, k and v are: the gradient of each then is one stack, and that of all one concatenation.
        parts = zip(self.qkv(x).split(rows), tokens, gates, strict=True)
        # Each part is projected separately: a concatenated input would be stored in addition to the results of attention.
        return torch.cat([self._part(*part) for part in parts])

    def _part(self, qkv_M: Tensor, tokens: int, gate_M: Tensor | None) -> Tensor:
        """Return the projected attention (M, d) of a part's rows."""
        M, width = qkv_M.shape  # a rank may have no tile, so no size is left to be inferred
        q, k, v = qkv_M.view(M // tokens, tokens, 3, self.num_heads, width // (3 * self.num_heads)).unbind(2)
        q, k, v = (x_BTHE.transpose(1, 2) for x_BTHE in (self.q_norm(q), self.k_norm(k), v))
        x_BHTE = F.scaled_dot_product_attention(q, k, v)
        x_M = x_BHTE.transpose(1, 2).reshape(M, width // 3)
        x_M = self.norm(x_M) if hasattr(self, "norm") else x_M
        out: Tensor = self.proj(x_M if gate_M is None else x_M * gate_M)
        return out


class PartsBlock(Block):
    """Pre-norm block of timm whose attention is computed separately within each part of the rows."""

    def forward(  # type: ignore[override]
        self, x: Tensor, tokens: Sequence[int] | None = None, **options: Any
    ) -> Tensor:
        """Return the output for sequences (B, T, d) or, if ``tokens`` states each part's tokens per tile, for rows (N, d)."""
        if tokens is None:
            out: Tensor = super().forward(x, **options)  # such as a mask
            return out
        x = x + self.ls1(self.attn(self.norm1(x), tokens))
        return x + self.ls2(self.mlp(self.norm2(x)))


def take_parts(blocks: Sequence[nn.Module]) -> bool:
    """Change the blocks in place to accept rows of several parts, and return True.

    If a block is not a plain pre-norm block without dropout, or the release of timm is newer than the tested one, change nothing
    and return False.
    """
    if release(timm.__version__) > TESTED or not all(map(_known, blocks)):
        return False
    for block in blocks:
        block.__class__ = PartsBlock
        block.get_submodule("attn").__class__ = PartsAttention
    return True


def timm_type(module: nn.Module | None) -> type:
    """Return the type of a module as timm built it."""
    ours: dict[type, type] = {PartsBlock: Block, PartsAttention: Attention}
    return ours.get(type(module), type(module))


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: (1, 0, 31) of ``1.0.31.dev0``."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def _known(block: nn.Module) -> bool:
    """Return whether a block has only modules that :class:`PartsBlock` can call with rows of several parts."""
    attn = getattr(block, "attn", None)
    if type(block) is not Block or type(attn) is not Attention or not attn.fused_attn:
        return False
    if not {n for n, _ in block.named_children()} <= _BLOCK or not {n for n, _ in attn.named_children()} <= _ATTENTION:
        return False
    dropped = any(isinstance(m, nn.Dropout) and m.p > 0 for m in block.modules())
    optional = (getattr(module, "norm", nn.Identity()) for module in (attn, block.mlp))
    norms = (block.norm1, block.norm2, attn.q_norm, attn.k_norm, *optional)
    return (
        not dropped
        and all(type(m) in _NORMS for m in norms)
        and all(type(m) in (nn.Identity, LayerScale) for m in (block.ls1, block.ls2))
        and all(type(m) is nn.Identity for m in (block.drop_path1, block.drop_path2))
        and type(block.mlp) in (Mlp, GluMlp, SwiGLU)
    )
