"""BLEEP's projection head."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

DROPOUT = 0.1


class ResidualProjection(nn.Module):
    """Linear, GELU, linear, dropout, residual, LayerNorm: (..., width) to (..., dim)."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.projection, self.fc, self.norm = nn.Linear(width, dim), nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., dim)."""
        projected = self.projection(x)
        return self.norm(projected + F.dropout(self.fc(F.gelu(projected)), DROPOUT, self.training))
