"""Part ``compiled``: the steps of part ``step`` with ``engine.compile``; a separate part, because compilation takes a minute."""

from __future__ import annotations

from bench.evidence.parts import step
from bench.evidence.rows import Rows


def run(rows: Rows, dry: bool) -> None:
    """Measure steps with compiled blocks; a dry run does not compile."""
    compiled = f"engine.compile={'false' if dry else 'true'}"
    step.run(rows, dry, compiled, name="step of 1gpu.yaml, compiled", panels=1)
