"""bench/scale: the memory of a block is that of its arrays, and synthetic validation sections have the chosen sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.scale.memory import MB, measured
from bench.scale.validation import COLUMNS, HEADER, cells, section_sizes

ARRAY_MB = 64


def may_reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not may_reset_peak(), reason="/proc/self/clear_refs cannot be written")
def test_memory_of_a_block() -> None:
    first: dict[str, float] = {}
    second: dict[str, float] = {}
    with measured(first):
        array = np.ones(round(ARRAY_MB * MB), np.uint8)
        del array  # the peak counts, not what is left
    with measured(second):
        pass
    assert ARRAY_MB * 0.9 < first["added"] < ARRAY_MB * 1.5
    assert second["added"] < ARRAY_MB * 0.5


@pytest.mark.parametrize(
    ("spots", "per_section", "sizes"),
    [(3000, 1000, [1000, 1000, 1000]), (2500, 1000, [1000, 1000, 500]), (300, 1000, [300])],
)
def test_sizes_of_sections(spots: int, per_section: int, sizes: list[int]) -> None:
    assert section_sizes(spots, per_section) == sizes


def test_a_row_fits_the_header() -> None:
    row = cells(dict.fromkeys(COLUMNS, 1234.56))
    assert row.count("|") == HEADER.count("|")
    assert "| 1,235 |" in row
    assert row.endswith("| 1,234.6 | 1,234.6 |")
