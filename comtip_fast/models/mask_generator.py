"""Mask feature generator, which predicts the features of hidden patches from those of visible patches.

Shapes: B tiles, P patches, V visible patches, K hidden patches, d the encoder's width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaskFeatureGenerator(nn.Module):
    """One cross-attention block, in which the queries of hidden patches attend to the features of visible patches.

    A query is a learnable vector plus the position embedding of the patch. Position embeddings are not shared with the encoder,
    so that the module works with sharded parameters (ZeRO 3).

    Parameters
    ----------
    width
        The encoder's width, d.
    heads
        Number of attention heads.
    n_patches
        Number of patches of a tile, P.

    Raises
    ------
    ValueError
        ``heads`` does not divide ``width``.
    """

    def __init__(self, width: int, heads: int, n_patches: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"vision.heads={heads}: does not divide the width of the image encoder ({width}); choose a divisor"
            )
        self.query_1d = nn.Parameter(torch.zeros(1, width))
        self.position_Pd = nn.Parameter(torch.randn(n_patches, width) * 0.02)
        self.norm_query, self.norm_visible = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.out = nn.Linear(width, width)

    def forward(self, visible_BVd: Tensor, hidden_BK: Tensor) -> Tensor:
        """Return the predicted features (B, K, d) of the patches with the int64 indices ``hidden_BK``."""
        query_BKd = nn.functional.embedding(hidden_BK, self.position_Pd) + self.query_1d
        keys_BVd = self.norm_visible(visible_BVd)
        attended_BKd, _ = self.attention(self.norm_query(query_BKd), keys_BVd, keys_BVd, need_weights=False)
        x_BKd = query_BKd + attended_BKd
        return self.out(x_BKd + self.mlp(self.norm_mlp(x_BKd)))
