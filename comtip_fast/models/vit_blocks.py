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
from comtip_kernels import image_attention, operand_dtype
from comtip_kernels.packed_attention import adds_bias, image_attention_runs
from timm.layers import Attention, GluMlp, LayerNorm, LayerScale, Mlp, RmsNorm, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from comtip_fast.models.fused_blocks import (
    Stream,
    after_attention,
    is_plain_gelu,
    is_plain_norm,
    keep_biases,
    normed,
    takes_bias,
)
from comtip_fast.runtime.torch_internals import attention_backend

TESTED = (1, 0, 31)
"""Newest release of timm that the tests ran with. ``pyproject.toml`` has the oldest."""
_BLOCK = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_ATTENTION = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
_NORMS = (nn.LayerNorm, LayerNorm, RmsNorm, nn.Identity)


class PartsAttention(Attention):
    """Attention of timm, computed separately within each part of the rows."""

    norms_heads: bool
    """Whether q and k are normalised; set by :func:`take_parts`, as a call of an identity takes as long as a view of a tensor."""
    norms_output: bool
    """Whether the result is normalised before its projection."""

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
        x_M = self.attended(qkv_M, tokens)
        out: Tensor = self.proj(x_M if gate_M is None else x_M * gate_M)
        return out

    def attended(self, qkv_M: Tensor, tokens: int) -> Tensor:
        """Return the attention (M, d) of a part's rows before its projection."""
        M, width = qkv_M.shape  # a rank may have no tile, so no size is left to be inferred
        q, k, v = qkv_M.view(M // tokens, tokens, 3, self.num_heads, width // (3 * self.num_heads)).unbind(2)
        if self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        x_BHTE = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x_M = x_BHTE.transpose(1, 2).reshape(M, width // 3)
        if self.norms_output:
            x_M = self.norm(x_M)
        return x_M


class PartsBlock(Block):
    """Pre-norm block of timm whose attention is computed separately within each part of the rows."""

    scales: bool
    """Whether the block has layer scales; set by :func:`take_parts`."""
    plain_mlp: bool
    """Whether the MLP has two linear layers and an activation only."""
    fused: bool = False
    """Whether rows pass through :meth:`_fused`."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        tokens: Sequence[int] | None = None,
        branch: Tensor | None = None,
        branch_bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor | Stream:
        """Return the output for sequences (B, T, d) or, if ``tokens`` states each part's tokens per tile, for rows (N, d).

        A fused block returns rows as a :class:`.fused_blocks.Stream`, and takes its fields.
        """
        if tokens is None:
            out: Tensor = super().forward(x, **options)  # such as a mask
            return out
        if self.fused:
            return self._fused(x if branch is None or branch_bias is None else Stream(x, branch, branch_bias), tokens)
        attended = self.attn(self.norm1(x), tokens)
        x = x + (self.ls1(attended) if self.scales else attended)
        mlp: Any = self.mlp
        rows = self.norm2(x)
        # timm's MLP also calls a norm and two dropouts, which do nothing here.
        rows = mlp.fc2(mlp.act(mlp.fc1(rows))) if self.plain_mlp else mlp(rows)
        return x + (self.ls2(rows) if self.scales else rows)

    def fuse(self) -> None:
        """Let :meth:`forward` compute the work between the products by few kernels (:mod:`.fused_blocks`)."""
        attn: Any = self.attn
        mlp: Any = self.mlp
        keep_biases(attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        self.fused = True

    def _fused(self, stream: Stream | Tensor, tokens: Sequence[int]) -> Stream:
        """Return the stream after the block, see :mod:`.fused_blocks`."""
        attn: Any = self.attn
        mlp: Any = self.mlp
        x_Nd, rows_Nd = normed(stream, self.norm1)
        (N, d), H = x_Nd.shape, attn.num_heads
        # A bias that attention does not add costs nothing in the linear layer.
        dtype, longest = operand_dtype(rows_Nd), max(tokens)
        later = attn.qkv.bias if adds_bias(rows_Nd.device, dtype, longest, images=True) else None
        qkv_NC = F.linear(rows_Nd, attn.qkv.weight, attn.qkv.bias if later is None else None)
        if image_attention_runs(rows_Nd.device, dtype, longest):
            attended = [image_attention(qkv_NC.view(N, 3, H, d // H), tokens, later).view(N, d)]
        else:
            parts = qkv_NC.split([N // sum(tokens) * T for T in tokens])
            attended = [attn.attended(part, T) for part, T in zip(parts, tokens, strict=True)]
        scales = (getattr(self.ls1, "gamma", None), getattr(self.ls2, "gamma", None))
        return after_attention(x_Nd, attended, (attn.proj, self.norm2, mlp.fc1, mlp.fc2), scales)

    @property
    def can_fuse(self) -> bool:
        """Whether :meth:`_fused` computes what :meth:`forward` does: no adapters, gates, other MLPs or norms within attention."""
        attn: Any = self.attn
        mlp: Any = self.mlp
        if not self.plain_mlp or attn.norms_heads or attn.norms_output or getattr(attn, "gate", None):
            return False
        layers = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        norms = is_plain_norm(self.norm1) and is_plain_norm(self.norm2)
        return norms and is_plain_gelu(mlp.act) and all(map(takes_bias, layers))


def take_parts(blocks: Sequence[nn.Module]) -> bool:
    """Change the blocks in place to accept rows of several parts, and return True.

    If a block is not a plain pre-norm block without dropout, or the release of timm is newer than the tested one, change nothing
    and return False.
    """
    if release(timm.__version__) > TESTED or not all(map(_known, blocks)):
        return False
    for block in blocks:
        block.__class__ = PartsBlock
        assert isinstance(block, PartsBlock)
        mlp: Any = block.mlp
        block.scales = not (_is_identity(block.ls1) and _is_identity(block.ls2))
        block.plain_mlp = type(mlp) is Mlp and _is_identity(mlp.norm)
        attn: Any = block.attn
        attn.__class__ = PartsAttention
        attn.norms_heads = not (_is_identity(attn.q_norm) and _is_identity(attn.k_norm))
        attn.norms_output = not _is_identity(getattr(attn, "norm", nn.Identity()))
    return True


def attention_name(blocks: nn.Module, tokens: int, device: torch.device, dtype: torch.dtype) -> str:
    """Return the implementation of attention in the blocks of an image encoder, for the log.

    Parameters
    ----------
    blocks
        The blocks.
    tokens
        Number of tokens of a tile.
    device, dtype
        Device and dtype of the forward pass.

    Returns
    -------
    str
        ``sdpa`` (PyTorch's ``scaled_dot_product_attention``) with the backend that PyTorch chooses for these sizes, ``eager`` if timm's
        fused attention is switched off, or ``timm`` for attention of another kind.
    """
    found = [m for m in blocks.modules() if hasattr(m, "fused_attn")]
    if not found or not all(hasattr(m, "num_heads") and hasattr(m, "head_dim") for m in found):
        return "timm"
    first: Any = found[0]
    if not first.fused_attn:
        return "eager"
    return f"sdpa ({attention_backend(first.num_heads, tokens, first.head_dim, device, dtype)})"


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity


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
