"""Measurements and checks on one GPU, in less than 9 minutes.

    python bench/gpu_evidence.py [--minutes 9] [--only step,resume] [--out bench/gpu_evidence.csv]
    python bench/gpu_evidence.py --dry-run              # without a GPU: every branch once at tiny sizes, without measured values
    python bench/gpu_evidence.py --gather wheels        # with network: download the wheels for the optional comparisons
    python bench/gpu_evidence.py --list

The script needs PyTorch, Triton, timm, tokenizers and NumPy; this checkout need not be installed. Batches are generated. Each part
runs in its own process with a deadline, and its rows are written as soon as they are measured, so a part that fails or hangs
affects only its own rows. In a dry run, all deadlines are 10 times as long. Comparisons with packages that are not installed are
skipped, and a row states it. docs/scaling.md describes the columns.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels", "data_shards")]

from bench.evidence.bare import replace_pydantic, replace_unused  # noqa: E402 (after sys.path)
from bench.evidence.rows import DRY_RUN, GPU, Rows, Table, today  # noqa: E402
from bench.evidence.runner import DRY_FACTOR, Part, environment, exiting_on_signals, longer, python, run_parts  # noqa: E402

PARTS = (
    Part("ceilings", 45, "versions, matrix products in bf16 and tf32, a copy, reads from L2"),
    Part("correct", 100, "every operation against fp64 on the GPU, from memory full of NaN, twice the same bits"),
    Part("step", 110, "steps of configs/1gpu.yaml: host waits, spots/s, utilisation, memory, profile"),
    Part("timings", 100, "forward and backward of every operation, with eager, cuBLAS, ClipLoss, Liger, varlen, sdpa"),
    Part("curve", 60, "50 steps of a tiny config next to the losses of the CPU"),
    Part("resume", 45, "a stopped and resumed run against an uninterrupted one, bit by bit"),
    Part("nccl", 60, "one NCCL rank: collectives, DDP, ZeRO, and the loss over emulated ranks"),
    Part("jpeg", 40, "JPEG decoding with nvJPEG and DALI against libjpeg"),
    Part("cases", 150, "the kernels' test cases (pytest -m gpu tests/kernels)", "bench.evidence.parts.cases_pytest"),
    Part("plain", 60, "the step with the blocks of PyTorch and timm", "bench.evidence.parts.step_plain"),
    Part("compiled", 100, "the step with engine.compile", "bench.evidence.parts.step_compiled"),
)
"""The parts in the order in which they run. Their deadlines sum to more than ``--minutes``, because most parts need less than theirs;
every part is sure of the same share of its deadline (:func:`bench.evidence.runner.run_parts`)."""


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen parts, list them, gather wheels, or run one part in this process.

    Returns the exit status: 1 if a part did not succeed, 2 if an argument is wrong or there is no GPU, otherwise 0.
    """
    args = options(arguments)
    if args.list:
        print("\n".join(f"{p.name:<12}{p.seconds:>4} s  {p.shows}" for p in PARTS))
        return 0
    if args.gather is not None:
        from bench.evidence.gather import gather

        return gather(args.gather)
    if args.part:
        return run_here(args.part, args.dry_run)
    chosen = [p for p in PARTS if not args.only or p.name in args.only.split(",")]
    unknown = set(filter(None, args.only.split(","))) - {p.name for p in PARTS}
    if unknown or not chosen:
        print(f"--only {args.only}: unknown part; choose from {', '.join(p.name for p in PARTS)}", file=sys.stderr)
        return 2
    env = environment(args.dry_run)
    about = describe(args.dry_run, env)
    if not args.dry_run and about["gpu"] == "none":
        print("no GPU: PyTorch finds no CUDA device; use --dry-run to run every branch without one", file=sys.stderr)
        return 2
    out = args.out or default_out(args.dry_run)
    try:
        table = Table(out, about)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    log = out.with_suffix(".log")
    script = Path(__file__).resolve()
    seconds = 60 * args.minutes * (DRY_FACTOR if args.dry_run else 1)
    parts = longer(chosen, args.dry_run)
    with exiting_on_signals():
        outcomes = run_parts(parts, lambda p: python(script, p, args.dry_run), table, seconds=seconds, log=log, env=env)
    table.close()
    print(f"{sum(o.rows for o in outcomes.values())} rows in {out}; output of the parts in {log}")
    return int(any(o.status != "ok" for o in outcomes.values()))


def options(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="deadline of all parts together (default 9)")
    parser.add_argument("--only", default="", help="names of parts to run, separated by commas (default: all)")
    parser.add_argument("--out", type=Path, help="table to append to (default bench/gpu_evidence.csv)")
    parser.add_argument("--dry-run", action="store_true", help="run tiny sizes on the CPU; rows have the mode dry_run")
    parser.add_argument("--gather", type=Path, metavar="DIR", help="download the wheels for the optional comparisons")
    parser.add_argument("--list", action="store_true", help="list the parts and their deadlines")
    parser.add_argument("--part", choices=[p.name for p in PARTS], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def default_out(dry: bool) -> Path:
    """Return the path of the table: in ``bench/``, or in a temporary folder for a dry run."""
    if dry:
        return Path(tempfile.mkdtemp(prefix="comtip-evidence-")) / "dry_run.csv"
    return ROOT / "bench" / "gpu_evidence.csv"


def run_here(name: str, dry: bool) -> int:
    """Run one part in this process."""
    replace_pydantic()
    replace_unused()
    part = next(p for p in PARTS if p.name == name)
    importlib.import_module(part.target).run(Rows(dry), dry)
    return 0


def describe(dry: bool, env: dict[str, str]) -> dict[str, str]:
    """Return the columns that describe the machine; exit if PyTorch or Triton cannot be imported.

    They are imported in another process, so that this one has no CUDA context.
    """
    code = (
        "import torch, triton; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'none',"
        "torch.__version__, triton.__version__, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(f"PyTorch and Triton cannot be imported: {done.stderr.strip().splitlines()[-1]}; install both")
    gpu, torch, triton = done.stdout.strip().splitlines()[-3:]
    names = {"date": today(), "commit": commit() or "unknown", "mode": DRY_RUN if dry else GPU}
    return names | {"gpu": "none" if dry else gpu, "torch": torch, "triton": triton}


def commit() -> str:
    """Return the commit of this checkout, "" without git or outside a repository."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
