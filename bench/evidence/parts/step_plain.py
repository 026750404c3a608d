"""Part ``plain``: the steps of part ``step`` without ``engine.fused_blocks``, for the ratio of both."""

from __future__ import annotations

from bench.evidence.parts import step
from bench.evidence.rows import Rows


def run(rows: Rows, dry: bool) -> None:
    """Measure steps whose norms, residual sums and activations are operators of PyTorch."""
    step.run(rows, dry, "engine.fused_blocks=false", name="step of 1gpu.yaml, plain blocks", panels=1)
