"""A busy step is measured alone and while a loader feeds it; synthetic sets have tiles of the requested width."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from comtip_shards import ShardSet

ROOT = Path(__file__).parents[2]


def _run(script: str, *words: str) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in [str(ROOT), *sys.path] if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "bench" / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fed_step_is_compared_with_the_step_alone(tiny_shards: ShardSet):
    words = [
        "--panel",
        "5",
        "--workers",
        "1",
        "--loaders",
        "torch",
        "--shares",
        "0.0001",
        "--rounds",
        "1",
        "--steps",
        "2",
    ]
    lines = _run("loader/feeding.py", str(tiny_shards.path), *words, "--control").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [row[0] for row in rows] == ["loader", "---", "torch, threads", "torch, process"]
    assert {row[1] for row in rows[2:]} == {"2"}
    # Alone, fed, and their ratio.
    assert all(float(row[column].split()[0]) > 0 for row in rows[2:] for column in (4, 5, 7, 8))
    assert "load average before the start" in lines[-1]


def test_a_synthetic_set_has_tiles_of_the_requested_width_and_grain(tmp_path: Path):
    sizes = ["--spots", "60", "--sections", "2", "--genes", "50", "--jobs", "1"]
    for name, more in {"smooth": ["--px", "64"], "grain": ["--px", "64", "--grain", "15"], "default": []}.items():
        _run("scale/start.py", "build", "--out", str(tmp_path / name), *sizes, *more)
    tiles = {name: ShardSet(tmp_path / name) for name in ("smooth", "grain", "default")}
    assert [s.manifest.tile.px for s in tiles.values()] == [64, 64, 128]
    assert [s.manifest.tile.min_mpp for s in tiles.values()] == [3.5, 3.5, 1.75]
    assert tiles["smooth"].tiles([0]).shape == (1, 64, 64, 3)
    assert len(tiles["grain"].members([0], "tile")[0]) > 1.5 * len(tiles["smooth"].members([0], "tile")[0])
