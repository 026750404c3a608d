"""Proof of the cost gates: kernels and CPU paths are slowed on purpose, and ``make ledger`` or ``make bench`` must notice.

    python bench/kernels/break_gates.py [--only doubled-loop,cpu]

Each fault changes a temporary copy of ``kernels/`` and leaves the results as they were, so that no test of values can notice it. The
exit status is 1 if a gate passes. The kernels whose source changed are compiled for sm_90 only, which takes a minute per fault on
idle cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "kernels/comtip_kernels"
LEDGER = ("-m", "comtip_kernels.ledger", "--check", "--table", "bench/ledger.csv", "--sizes", "bench/traffic.csv")
CPU = ("bench/kernels/cpu_ratios.py", "--check")
DOT = "acc = tl.dot(q, tl.trans(k), acc, input_precision=PRECISION)"
ONE_ARCHITECTURE = ("ledger/toolchain.py", "ARCHITECTURES = (80, 90, 100)", "ARCHITECTURES = (90,)")
SLEEP = "    import time; time.sleep(0.5)\n"


@dataclass(frozen=True)
class Fault:
    """One change for the worse."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    """(file below ``kernels/comtip_kernels``, text, replacement); every occurrence is replaced."""
    gate: tuple[str, ...] = LEDGER


FAULTS = (
    Fault(
        "repeated-product",
        # The second product is multiplied by a number that is 0, which the compiler does not know.
        (
            (
                "infonce/logit_tiles.py",
                DOT,
                f"{DOT} + tl.dot(k, tl.trans(q), input_precision=PRECISION).trans() * (n_rows < 0).to(tl.float32)",
            ),
        ),
    ),
    Fault("fewer-stages", (("tiles.py", '"num_stages": 3', '"num_stages": 2'),)),
    Fault("smaller-tile", (("tiles.py", '{"BM": 128, "BN": 128', '{"BM": 64, "BN": 128'),)),
    Fault(
        "four-exponentials",
        (
            (
                "infonce/triton_kernels.py",
                "    e = tl.where(ok, e, 0.0)\n",
                "    e = tl.where(ok, e, tl.exp2(s * 0.0) * 0.0"
                + "".join(f" + tl.exp2(s * {f}) * 0.0" for f in ("0.5", "0.25", "0.125"))
                + ")\n",
            ),
        ),
    ),
    Fault(
        "doubled-loop",
        (
            (
                "sentence_table/triton_kernels.py",
                "    for start in range(first, end, NG):\n",
                (
                    "    for step in range(first, end + end - first, NG):\n"
                    "        start = tl.where(step < end, step, step - end + first)\n"
                ),
            ),
        ),
    ),
    Fault(
        "cpu",
        tuple(
            (file, f'{text}"""\n', f'{text}"""\n{SLEEP}')
            for file, text in (
                ("infonce/cpu.py", "a scalar in at least fp32; see :func:`comtip_kernels.infonce`."),
                ("gene_sentence_embedding/cpu.py", "see :mod:`comtip_kernels.gene_sentence_embedding.reference`."),
                ("packed_attention/cpu.py", "their gradient is written batch by batch, to stay in the CPU cache."),
                ("table_pool/cpu.py", "Return t (B, D); see :mod:`comtip_kernels.table_pool.reference`."),
                ("level_cross_entropy/cpu.py", "a scalar; see :mod:`comtip_kernels.level_cross_entropy.reference`."),
                (
                    "level_cross_entropy/cpu.py",
                    "logits of the pair head (B, G); see :mod:`comtip_kernels.level_cross_entropy.reference`.",
                ),
                (
                    "one_query_attention/cpu.py",
                    "Return (N, H, D); see :mod:`comtip_kernels.one_query_attention.reference`.",
                ),
                ("gene_sentence_embedding/cpu.py", "Return (S, C); see :func:`comtip_kernels.copy_sentence_rows`."),
            )
        ),
        CPU,
    ),
)


def caught(fault: Fault) -> list[str]:
    """Apply a fault to a copy of the repository's kernels, run its gate there, and return what the gate reports.

    Raises
    ------
    ValueError
        A text of the fault is not in its file.
    RuntimeError
        The gate reports nothing and does not pass either.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("kernels", "bench"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for name, text, replacement in (ONE_ARCHITECTURE, *fault.edits):
            path = copy / PACKAGE / name
            source = path.read_text(encoding="utf-8")
            if text not in source:
                raise ValueError(f"{fault.name}: {name} does not contain {text!r}; adapt the fault to the code")
            path.write_text(source.replace(text, replacement), encoding="utf-8")
        paths = [str(copy / "kernels"), str(copy / "bench" / "kernels")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *fault.gate], cwd=copy, env=env, capture_output=True, text=True, check=False
        )
    worse = [line.removeprefix("WORSE  ") for line in done.stderr.splitlines() if line.startswith("WORSE")]
    if done.returncode not in (0, 1) or bool(worse) != (done.returncode == 1):
        raise RuntimeError(f"{fault.name}: the gate ended with {done.returncode}: {done.stderr[-500:]}")
    return worse


def main() -> int:
    """Apply the chosen faults one by one; return 1 if a gate does not notice one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="names of faults, separated by commas (default: all)")
    args = parser.parse_args()
    passed = []
    for fault in FAULTS:
        if args.only and fault.name not in args.only.split(","):
            continue
        worse = caught(fault)
        rows = {line.partition(":")[0] for line in worse}
        print(f"{fault.name:<20}{len(rows)} rows worse, for example: {worse[0] if worse else 'none'}", flush=True)
        passed += [] if worse else [fault.name]
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main())
