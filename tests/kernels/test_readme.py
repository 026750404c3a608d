"""kernels/README.md: its examples run, and its tables are those of the committed ledger."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "kernels/README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot", ROOT / "bench/kernels/plot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "kernels/README.md", "exec"), names)
    assert names["image"].grad.abs().sum() > 0
    assert names["loss"].log_scale.grad != 0
    assert names["scale"].grad != 0


def test_the_tables_are_the_ledgers(plot: ModuleType):
    assert plot.table(plot.read(ROOT / "bench/traffic.csv")) in README
    assert plot.kernels_table(plot.read(ROOT / "bench/ledger.csv")) in README
    assert plot.ways_table() in README
    assert plot.tiles_table() in README


def test_the_figure_can_be_drawn(plot: ModuleType, tmp_path: Path):
    plot.draw(plot.read(ROOT / "bench/traffic.csv"), tmp_path / "floors.png")
    assert (tmp_path / "floors.png").stat().st_size > 10_000
    assert (ROOT / "kernels/floors.png").is_file()
