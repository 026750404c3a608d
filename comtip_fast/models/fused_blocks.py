"""Pre-norm transformer blocks whose work between the products is done by few kernels (:func:`comtip_kernels.residual_norm`).

A block adds the result of its MLP in the kernel that computes the next block's norm. Between two blocks there is thus a stream and
a branch that is not added yet, with the bias of the linear layer that computed it (:class:`Stream`). Values are those of the
plain blocks up to rounding: a bias is added in fp32, after the product was rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from comtip_kernels import bias_gelu, residual_norm
from torch import Tensor, nn
from torch.nn import functional as F


class Stream(NamedTuple):
    """Rows between two blocks."""

    x_Nd: Tensor
    """Stream without the last branch."""
    branch_Nd: Tensor
    """The branch that is to be added."""
    bias_d: Tensor
    """A bias that is to be added with the branch."""

    def whole(self) -> Tensor:
        """Return the stream with the branch."""
        return self.x_Nd + (self.branch_Nd + self.bias_d)


def arguments(out: Stream | Tensor, *, recompute: bool) -> tuple[Tensor, ...]:
    """Return the arguments of the next block: rows, and the branch of a fused block.

    With activation checkpointing the branch is added first, because one tensor is stored then, not two.
    """
    if isinstance(out, Tensor):
        return (out,)
    return (out.whole(),) if recompute else out


def takes_bias(layer: nn.Module) -> bool:
    """Return whether a layer is a plain linear layer with a bias, which a fused block adds elsewhere."""
    return type(layer) is nn.Linear and layer.bias is not None


def is_plain_norm(norm: nn.Module) -> bool:
    """Return whether a module is a LayerNorm with gain and bias."""
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def is_plain_gelu(activation: nn.Module) -> bool:
    """Return whether a module is the exact GELU."""
    return type(activation) is nn.GELU and activation.approximate == "none"


def keep_biases(*layers: nn.Module) -> None:
    """Mark linear layers whose biases are added in fp32, so that casts of weights leave them out (:mod:`comtip_fast.runtime.weight_casts`)."""
    for layer in layers:
        layer.KEEPS_BIAS = True  # type: ignore[assignment]


def normed(stream: Stream | Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the whole stream (N, d), and its norm (N, d); that of rows without a branch is PyTorch's."""
    if isinstance(stream, Tensor):
        return stream, norm(stream)
    assert isinstance(norm, nn.LayerNorm)
    return residual_norm(*stream, norm.weight, norm.bias, eps=norm.eps)


def after_attention(
    x_Nd: Tensor,
    attended: Sequence[Tensor],
    layers: tuple[nn.Linear, nn.Module, nn.Linear, nn.Linear],
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Stream:
    """Return the stream after a block, from what its attention computed.

    Parameters
    ----------
    x_Nd
        Stream before the block.
    attended
        Values that attention computed, before their projection: (N, d), or the rows of each part. Parts are projected separately, because
        a concatenated input would be stored in addition to them.
    layers
        The projection of attention, the norm before the MLP, and the MLP's two linear layers.
    scales
        Layer scales (d,) of attention and of the MLP (Touvron et al. 2021), None for none.
    """
    out, norm, up, down = layers
    x_Nd, rows_Nd = normed(Stream(x_Nd, *_branch(attended, out, scales[0])), norm)
    hidden = bias_gelu(F.linear(rows_Nd, up.weight), up.bias)
    return Stream(x_Nd, *_branch([hidden], down, scales[1]))


def _branch(parts: Sequence[Tensor], layer: nn.Linear, scale_d: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the product of a branch's last layer without its bias, and the bias.

    A layer scale multiplies the layer's weights, which are far fewer than its results.
    """
    weight, bias = layer.weight, layer.bias
    if scale_d is not None:
        weight, bias = weight * scale_d[:, None], bias * scale_d  # type: ignore[assignment]
    rows = [F.linear(part, weight) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows), bias
