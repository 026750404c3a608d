"""Part ``cases``: the kernels' test cases on the GPU, with one row per test as soon as it has run.

The tests that ``tests/kernels/test_interpreted.py`` runs in Triton's interpreter take the device from a fixture; with the mark
``gpu``, the same cases run on the compiled kernels. This module is also the pytest plugin.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from bench.evidence.bare import replace_pydantic
from bench.evidence.cases import why_not
from bench.evidence.rows import Row, Rows

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = "bench.evidence.parts.cases_pytest"
FILES = (
    "test_infonce.py",
    "test_table.py",
    "test_packed_attention.py",
    "test_one_query_attention.py",
    "test_gene_sentence_embedding.py",
    "test_fixed_shapes.py",
    "test_block_pointwise.py",
    "test_image_attention.py",
)
"""Test files that ``tests/kernels/test_interpreted.py`` also runs."""
WORKERS = 6
"""Processes of pytest-xdist; most of the time is spent compiling kernels on the host."""

replace_pydantic()  # before the project's conftest.py is imported, in every process that loads this plugin


class _Sender:
    """Sends a row for every test; under pytest-xdist, only in the process that collects the reports."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Send the outcome of a test, or of a fixture that failed or skipped it."""
        if report.when != "call" and report.passed:
            return
        status = {"passed": "ok", "failed": "failed", "skipped": "skipped"}[report.outcome]
        note = "" if report.passed else str(report.longreprtext or report.longrepr).strip().splitlines()[-1]
        self.rows.add(
            Row(report.nodeid.removeprefix("tests/kernels/"), "test", report.outcome, status=status, note=note)
        )


def run(rows: Rows, dry: bool) -> None:
    """Run the tests from this process, on a GPU with pytest-xdist if it is installed; exit if pytest itself fails."""
    if missing := why_not("pytest"):
        rows.skip("tests/kernels", missing)
        return
    import pytest

    for folder in (".", "kernels", "data_shards"):  # for the workers
        os.environ["PYTHONPATH"] = f"{ROOT / folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    os.chdir(ROOT)
    words = [*(f"tests/kernels/{name}" for name in FILES), "-m", "gpu"]
    if dry:  # the interpreter runs the same tests without the mark
        words = ["tests/kernels/test_table.py", "-k", "test_too_many or no_gene or empty"]
    # Without addopts, because their plugins may be missing, and without tests/conftest.py, which needs anndata.
    words += [
        "--confcutdir=tests/kernels",
        "-p",
        PLUGIN,
        "-p",
        "no:cacheprovider",
        "-q",
        "-o",
        "addopts=",
        "--import-mode=importlib",
    ]
    if not dry and not why_not("xdist"):
        words += ["-n", str(WORKERS)]
    code = int(pytest.main(words, plugins=[_Sender(rows)]))
    if code not in (0, 1):  # 1: tests failed, which their rows state
        sys.exit(code)
