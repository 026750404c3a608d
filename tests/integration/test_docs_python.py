"""The Python examples of the documents run, on a tiny synthetic data set."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from comtip_fast.config.io import dump_config, load_config
from testkit.tiny import TinySection, write_tiny_source
from tests.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]
MPP = 5.0
SECTIONS = (TinySection("A", "d1", "train"), TinySection("B", "d2", "val"), TinySection("C", "d3", "test"))
ORDER = ("docs/start.md",)
"""Documents whose examples write what the others read."""
SMALL = {
    "docs/start.md": {'"tile_px": 128': '"tile_px": 32'},
    "README.md": {
        '"runs/demo/shards:mob_Rep9", ["Penk", "Doc2g", "TTN"]': '"runs/demo/shards:C", ["ERBB2", "TTN"]',
        '{"mpp": 0.5, "species": "mouse"}': f'{{"mpp": {MPP}, "species": "human"}}',
    },
    "docs/results.md": {'labels="label"': 'labels=["ab"[i % 2] for i in range(joined.n_obs)]'},
    "data_shards/README.md": {'"data_shards/samples", samples=["her2st_A1"]': '"my/sections", samples=["A"]'},
}
"""{document: {text of the example: what stands for it on the tiny set}}."""


def documents() -> list[str]:
    """Return the documents with Python examples; those that others need come first."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the tracked files are unknown")
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [n for n in tracked.stdout.split() if "/fixtures/" not in n and any(blocks(n))]
    return sorted(names, key=lambda n: (n not in ORDER, n))


def blocks(document: str) -> Iterator[str]:
    """Yield the Python examples of a document, each on the lines that it has there, for tracebacks."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield "\n" * text[: match.start(1)].count("\n") + match[1]


def run(document: str, names: dict[str, object]) -> None:
    """Run the examples of a document in order, in one namespace, as a reader would."""
    used = set()
    for block in blocks(document):
        source = block
        for text, small in SMALL.get(document, {}).items():
            if text in source:
                used.add(text)
                source = source.replace(text, small)
        exec(compile(source, document, "exec"), names)
    assert used == set(SMALL.get(document, {})), f"{document}: replacements that nothing needs"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder of a reader, with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    write_tiny_source(tmp_path / "my/sections", SECTIONS)
    (tmp_path / "configs").mkdir()
    settings = [*TINY, "train.steps=5", "train.device=cpu"]
    (tmp_path / "configs/demo_cpu.yaml").write_text(dump_config(load_config(None, settings)))
    with Image.open(tmp_path / "my/sections/C.png") as image:
        image.save(tmp_path / "slide.tif", dpi=(25_400 / MPP, 25_400 / MPP))
    (tmp_path / "slide.svs").symlink_to("slide.tif")
    return tmp_path


def test_every_python_example_runs(folder: Path):
    found = documents()
    assert {"README.md", "docs/start.md", "kernels/README.md", "data_shards/README.md"} <= set(found)
    tiles = np.random.default_rng(0).integers(0, 256, (4, 448, 448, 3), np.uint8)
    for document in found:
        names: dict[str, object] = {"tiles": tiles}
        run(document, names)
        if document == "docs/start.md":
            names["predicted"].write_h5ad("my_visium.h5ad")
            (folder / "runs").mkdir()
            (folder / "runs/demo").symlink_to("../my/run")
            (folder / "my/run/shards").symlink_to("../shards")
    assert (folder / "my/scores/report.html").is_file()
    assert (folder / "adapted/adaptation.json").is_file()
    assert (folder / "maps.png").is_file()


def test_an_example_that_fails_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "page.md").write_text("# Page\n```python\nx = 1\nx.gone\n```\n")
    monkeypatch.setattr("tests.integration.test_docs_python.ROOT", tmp_path)
    with pytest.raises(AttributeError) as error:
        run("page.md", {})
    assert error.traceback[-1].lineno + 1 == 4
