"""Mutation test of the Triton kernels: a test must fail for each fault that is put into a kernel.

    python bench/kernels/mutate.py [--only lse_tiles,grad_tiles] [--sample 6] [--list]

For each mutant, one expression of one kernel is replaced in a temporary copy of ``kernels/`` and ``tests/kernels/``, and the tests
of that kernel run in Triton's interpreter until the first failure. The exit status is 1 if a mutant survives. All mutants take
about an hour of CPU time, so they run nightly; ``tests/kernels/test_mutants.py`` checks that every mutant can still be applied.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.kernels import mutants_blocks, mutants_products  # noqa: E402 (after sys.path)
from bench.kernels.mutant import QUICK, Mutant  # noqa: E402

MUTANTS = [*mutants_products.MUTANTS, *mutants_blocks.MUTANTS]


def run(mutant: Mutant) -> tuple[bool, str]:
    """Return whether a test failed or the interpreter crashed, and the name of the test, "" if it is not known.

    Raises
    ------
    RuntimeError
        pytest could not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=ignore)
        shutil.copytree(ROOT / "tests/kernels", copy / "tests/kernels", ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "kernels/comtip_kernels" / mutant.file
        path.write_text(mutant.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
        paths = [str(copy / "kernels"), str(ROOT), str(ROOT / "data_shards")]
        env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        tests = [f"tests/kernels/{name}" for name in mutant.tests()]
        words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--rootdir", ".", *tests]
        for selected in (["-k", QUICK[mutant.file]], []) if mutant.kind != "dtype" else ([],):
            done = subprocess.run([*words, *selected], cwd=copy, env=env, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                break
    failed = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py\S*)", done.stdout, flags=re.MULTILINE)
    # Status 1: a test failed. A crash of the interpreter (negative status) also kills; any other status is no result.
    if done.returncode not in (0, 1) and done.returncode > 0:
        raise RuntimeError(f"{mutant.name}: pytest could not run: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done.returncode != 0, failed[1] if failed else ""


def main() -> int:
    """Run or list the chosen mutants; return 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of kernels, separated by commas (default: all)")
    parser.add_argument("--sample", type=int, default=0, help="number of evenly spaced mutants to run (default 0: all)")
    parser.add_argument("--list", action="store_true", help="list the mutants without running them")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.only or m.kernel in args.only.split(",")]
    if args.sample:
        chosen = chosen[:: max(1, len(chosen) // args.sample)][: args.sample]
    survivors = []
    for mutant in chosen:
        if args.list:
            print(f"{mutant.name:<44}{mutant.old}  ->  {mutant.new}")
            continue
        began = time.perf_counter()
        killed, test = run(mutant)
        print(
            f"{mutant.name:<44}{'killed by ' + test if killed else 'SURVIVED'} ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
        survivors += [] if killed else [mutant.name]
    if not args.list:
        print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
