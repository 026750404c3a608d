"""Run the tests of the Triton kernels in a process where Triton interprets: the switch is read when kernels are defined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "interpreted"
pytest.importorskip("triton")


@pytest.mark.parametrize("name", sorted(p.name for p in HERE.glob("test_*.py")))
def test_kernels_under_the_interpreter(name: str):
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # A session of its own: its rootdir, and so its settings, are those of this one.
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=540, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]
