"""Every change for speed or memory has a complete row in bench/LOG.md."""

import re
from pathlib import Path

import pytest

LOG = Path(__file__).resolve().parents[1] / "bench" / "LOG.md"
GROUPS = ["Kernels", "Step", "Loader and builds", "Distributed", "Inference and evaluation"]
COLUMNS = ["date", "commit", "change", "prediction", "measurement", "kind", "kept"]
KINDS = {"side by side", "one run", "counted", "compiled", "model", "none"}
ROW = "| 2026-12-01 | `0123abc` | tiles | 2 x | 1.9 x | counted, model | yes |"


def tables(text: str) -> dict[str, list[list[str]]]:
    """Return the cells of each row, by group, including the two rows of the head."""
    sections = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    return {
        group: [[cell.strip() for cell in line.strip("|").split("|")] for line in found[group].splitlines() if line]
        for group in GROUPS
    }


def problems(cells: list[str]) -> list[str]:
    """Return what is wrong with a row."""
    if len(cells) != len(COLUMNS):
        return [f"{len(cells)} cells instead of {len(COLUMNS)}"]
    row = dict(zip(COLUMNS, cells, strict=True))
    wrong = [f"empty cell: {name}" for name, cell in row.items() if not cell]
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]):
        wrong.append("date is not YYYY-MM-DD")
    if not re.fullmatch(r"`[0-9a-f]{7}`(, `[0-9a-f]{7}`)*|`not committed`", row["commit"]):
        wrong.append("commit is neither hashes of 7 digits nor `not committed`")
    if not set(row["kind"].split(", ")) <= KINDS:
        wrong.append(f"kind is not of {sorted(KINDS)}")
    if row["kept"] not in {"yes", "no"}:
        wrong.append("kept is not yes or no")
    if row["kind"] == "none" and re.search(r"\d ?(x|%|s|ms|us|MB|GB|MiB|GiB)\b", row["measurement"]):
        wrong.append("a figure without its kind")
    return wrong


@pytest.mark.parametrize("group", GROUPS)
def test_every_row_is_complete_and_rows_are_in_order(group: str):
    head, rule, *rows = tables(LOG.read_text(encoding="utf-8"))[group]
    assert head == COLUMNS
    assert rule == ["---"] * len(COLUMNS)
    assert rows
    assert [(row, wrong) for row in rows if (wrong := problems(row))] == []
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@pytest.mark.parametrize(
    ("correct", "broken", "message"),
    [
        ("| counted, model ", "", "6 cells instead of 7"),
        ("2 x", "", "empty cell: prediction"),
        ("2026-12-01", "today", "date"),
        ("`0123abc`", "HEAD", "commit"),
        ("counted", "felt", "kind"),
        ("yes", "maybe", "kept"),
        ("counted, model", "none", "a figure without its kind"),
    ],
)
def test_an_incomplete_row_is_detected(correct: str, broken: str, message: str):
    def wrong(line: str) -> list[str]:
        return problems([cell.strip() for cell in line.strip("|").split("|")])

    assert wrong(ROW) == []
    assert message in " ".join(wrong(ROW.replace(correct, broken)))
