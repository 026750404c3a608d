"""bench/scale: memory of a block, sizes of synthetic sections, and the command that runs all measurements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.scale import every
from bench.scale.memory import MB, measured
from bench.scale.validation import COLUMNS, HEADER, cells, section_sizes

ARRAY_MB, ROOT = 64, Path(__file__).resolve().parents[2]


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


def test_every_measurement_is_a_script_of_this_repository() -> None:
    scripts = [c.split()[0] for part in every.PARTS for c in part.commands] + [
        c.split()[0] for c in every.SETS.values()
    ]
    assert all(s == "-c" or (ROOT / s).is_file() for s in scripts), scripts
    own = {p.name for p in (ROOT / "bench/scale").glob("*.py")} - {"every.py", "memory.py", "slide.py", "zero_init.py"}
    assert own <= {Path(s).name for s in scripts}
    assert all(name in every.SETS for part in every.PARTS for name in part.sets)


def test_a_failed_measurement_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = "-c \"import sys; open(sys.argv[1], 'a').write(sys.argv[2])\" {work}/log "
    make = "-c \"import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'manifest.json').touch()\" {work}/"
    monkeypatch.setattr(every, "SETS", {"one": f"{make}one", "two": "-c 1/0"})
    parts = [
        every.Part("a", "", (f"{note}a",), ("one",)),
        every.Part("b", "", (f"{note}b", "-c 1/0"), ("one",)),  # fails if the set is built again
        every.Part("c", "", (f"{note}c",), ("two",)),
        every.Part("d", "", (f"{note}d",)),
    ]
    assert every.measure(parts, tmp_path, [ROOT, ROOT]) == ["b", "c"]
    assert (tmp_path / "log").read_text() == "aabbdd"
