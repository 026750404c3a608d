"""Run the tests of the Triton kernels in a process in which Triton interprets them.

TRITON_INTERPRET is read when kernels are defined. The files that all implementations share run here a second time, on the
Triton kernels.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED = (
    "test_block_pointwise.py",
    "test_fixed_shapes.py",
    "test_gene_sentence_embedding.py",
    "test_image_attention.py",
    "test_infonce.py",
    "test_packed_attention.py",
    "test_one_query_attention.py",
    "test_table.py",
)
FILES = [*SHARED, *sorted(f"interpreted/{p.name}" for p in (HERE / "interpreted").glob("test_*.py"))]
pytest.importorskip("triton")


@pytest.mark.nightly
def test_every_path_of_the_gpu_bench():
    interpret("interpreted/gpu_paths.py", timeout=1700)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_large_cases_under_the_interpreter():
    interpret("interpreted/test_infonce.py", timeout=1700, marks="nightly")


@pytest.mark.parametrize("name", FILES)
def test_kernels_under_the_interpreter(name: str):
    interpret(name)


def interpret(name: str, timeout: float = 580, marks: str = "not nightly") -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # A session of its own: its rootdir, and so its settings, are those of this one.
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, str(HERE / name)]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    # Of the shared files only what Triton does not support may be skipped.
    assert name in SHARED or "skipped" not in done.stdout.splitlines()[-1]
