"""The page of settings is generated, complete and current."""

from dataclasses import asdict
from pathlib import Path

from comtip_fast.config.io import flatten
from comtip_fast.config.schema import RunConfig
from comtip_fast.config.settings_page import page

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_committed_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "run: python -m comtip_fast.config.settings_page docs/settings.md"
    )


def test_every_key_has_a_row_with_its_bounds() -> None:
    rows = {line.split("`")[1]: line for line in page().splitlines() if line.startswith("| `")}
    assert set(rows) == set(flatten(asdict(RunConfig())))
    assert "| int | ≥ 3, ≤ 256 | `10` |" in rows["levels.n_levels"]
    assert "| int or null | ≥ 1 | `2` |" in rows["data.sections_per_batch"]
    assert "| [float, float] | each ≥ 0, < 1 | `[0.9, 0.98]` |" in rows["optim.betas"]
    assert all(len(line.split("|")) == 7 and line.split("|")[-2].strip() for line in rows.values())
