"""Projection head of BLEEP, for the baselines that are trained in evaluations and benchmarks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

DROPOUT = 0.1


class ResidualProjection(nn.Module):
    """Projection (..., width) to (..., dim): linear layer, residual branch of GELU, linear layer and dropout, LayerNorm."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.projection, self.fc, self.norm = nn.Linear(width, dim), nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection of ``x``, (..., dim)."""
        projected = self.projection(x)
        return self.norm(projected + F.dropout(self.fc(F.gelu(projected)), DROPOUT, self.training))
