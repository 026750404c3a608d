"""Walks of inference: validation, predict, embed."""

from __future__ import annotations

from testkit.rehearsal.record import Record
from testkit.rehearsal.walk import Walk


def infer(walk: Walk) -> Record:
    """Walk one part of inference."""
    raise NotImplementedError(walk.part)
