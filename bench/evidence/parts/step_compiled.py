"""Part ``compiled``: the same steps with ``engine.compile``; a part of its own because compilation takes a minute."""

from __future__ import annotations

from bench.evidence.parts import step
from bench.evidence.rows import Rows


def run(rows: Rows, dry: bool) -> None:
    """Measure steps with compiled blocks; a dry run does not compile."""
    compiled = f"engine.compile={'false' if dry else 'true'}"
    step.run(rows, dry, compiled, name="step of 1gpu.yaml, compiled", panels=1)
