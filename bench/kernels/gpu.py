"""Check every Triton operation on this machine's GPU, then time it and other implementations.

    python bench/kernels/gpu.py [--only infonce,packed_attention] [--out bench/gpu_results.csv]
    TRITON_INTERPRET=1 python bench/kernels/gpu.py --dry-run      # without a GPU: every path once at small sizes, without times

This is for work on one kernel: sizes are large, and the first error ends the run. ``bench/gpu_evidence.py`` runs the same cases
(``bench/evidence``) at more sizes and continues after an error. Times are those of forward and backward with CUDA events and a cold
L2 cache, as median with 20 % and 80 % quantiles. Percent of roofline is the larger of FLOPs / peak and bytes / bandwidth, relative
to the sum of both medians; the peak (a large bf16 product) and the bandwidth (a large copy) of this GPU are measured in the same
run. FLOPs are those of the definition, without logits that a kernel recomputes. Rows are appended with GPU, versions and commit.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import sys
from pathlib import Path

import torch
import torch._functorch.config as functorch_config

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels", "data_shards")]

from bench.evidence.block_cases import images_case, pointwise_cases  # noqa: E402 (after sys.path)
from bench.evidence.cases import (  # noqa: E402
    Case,
    Loss,
    attention_case,
    block_case,
    embedding_case,
    infonce_case,
    masked_cases,
    one_query_case,
    table_cases,
)
from bench.evidence.check import PRECISIONS, check  # noqa: E402
from bench.evidence.timing import Passes, time_call, time_passes, time_products  # noqa: E402

COLUMNS = (
    "date",
    "gpu",
    "torch",
    "triton",
    "commit",
    "op",
    "size",
    "provider",
    "pass",
    "ms_50",
    "ms_20",
    "ms_80",
    "peak_mib",
    "percent_of_roofline",
)


def all_cases(device: str, small: bool) -> list[Case]:
    """Return the cases of every operation at the sizes of kernels/README.md, or at small ones."""
    B, M, D = (40, 60, 32) if small else (8192, 16384, 512)
    # In fp32 without tf32, the kernels support 24 tokens.
    lengths = {16: 12, 32: 5} if small else {n: 2_432_000 // (3 + n) for n in (10, 16, 24, 32, 48)}
    heads, peers = ((2, 16), ()) if small else ((8, 64), ("flash", "varlen"))
    return [
        infonce_case(device, B, M, D),
        infonce_case(device, B, B, D),
        block_case(device, *((40, 24, 32) if small else (65536, 2048, 512))),
        embedding_case(device, *((6, 3, 32, 6, 20) if small else (2048, 32, 512, 18, 4099))),
        *(attention_case(device, N, *heads, longest, peers) for longest, N in lengths.items()),
        one_query_case(device, *((12, 2, 32, 16) if small else (65536, 8, 512, 18))),
        *table_cases(device, *((20, 9, 5, 32) if small else (4096, 2048, 32, 512))),
        *pointwise_cases(device, *((9, 20) if small else (77_824, 768))),
        images_case(device, *((2, 2, 16, (7, 4)) if small else (1024, 12, 64, (50, 26)))),
    ]


def measured_peaks() -> tuple[float, float]:
    """Return this GPU's bf16 FLOP/s and bytes/s, from one large product and one large copy."""
    flops = 2 * 8192**3 / time_products(((8192, 8192, 8192),), "cuda").seconds
    x = torch.randint(256, (2**30,), device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    return flops, 2 * 2**30 / time_call(lambda: y.copy_(x), "cuda", cold=False).seconds


def about() -> dict[str, str]:
    """Return the columns that describe the machine."""
    import triton

    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {
        "date": date,
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
    }


def append(path: Path, rows: list[dict[str, str]]) -> None:
    """Append rows to the table of results; the first write adds the header."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            out.writeheader()
        out.writerows(rows)


def rows_of(case: Case, name: str, passes: Passes, share: float) -> list[dict[str, str]]:
    """Return the rows of one implementation, one per pass; ``share`` is the percentage of the roofline."""
    return [
        about()
        | {
            "op": case.op,
            "size": case.size,
            "provider": name,
            "pass": which,
            "ms_50": f"{time.median:.4f}",
            "ms_20": f"{time.low:.4f}",
            "ms_80": f"{time.high:.4f}",
            "peak_mib": f"{passes.peak_mib:.0f}",
            "percent_of_roofline": f"{share:.1f}",
        }
        for which, time in (("forward", passes.forward), ("backward", passes.backward))
    ]


def time_case(case: Case, device: str, peaks: tuple[float, float], dry: bool) -> list[dict[str, str]]:
    """Time our implementation and the others, print the times, and return their rows; a dry run returns none."""
    providers: dict[str, Loss] = {"ours": case.ours, "torch eager": case.reference, **case.peers}
    if not dry and "torch.compile" not in providers:
        providers["torch.compile"] = torch.compile(case.reference)
    for name, reason in case.missing.items():
        print(f"{case.op:<26}{name:<24}is not timed: {reason}")
    rows = []
    for name, loss in providers.items():
        try:
            passes = time_passes(loss, case.inputs, device)
        except RuntimeError as error:  # out of memory, or a size that the implementation does not support
            if name == "ours":
                raise
            print(f"{case.op:<26}{name:<24}failed: {str(error).splitlines()[0]}")
            continue
        if dry:
            print(f"{case.op:<26}{name:<24}ran")
            continue
        both = passes.forward.seconds + passes.backward.seconds
        share = 100 * max(case.flops / peaks[0], case.bytes / peaks[1]) / both
        times = f"{passes.forward.median:>9.3f} ms forward {passes.backward.median:>9.3f} ms backward"
        print(f"{case.op:<26}{name:<24}{times} {passes.peak_mib:>9.0f} MiB {share:>6.1f} % of roofline")
        rows += rows_of(case, name, passes, share)
    return rows


def main() -> None:
    """Check and time the chosen operations, and append the rows to the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="operations, separated by commas (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench/gpu_results.csv"),
        help="table to append to (default bench/gpu_results.csv)",
    )
    parser.add_argument("--dry-run", action="store_true", help="run small sizes on any machine, and write nothing")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit(
            "no GPU: PyTorch finds no CUDA device; use TRITON_INTERPRET=1 python bench/kernels/gpu.py --dry-run to run every path "
            "without one"
        )
    # Otherwise torch.compile's backward pass may free buffers that a second call needs.
    functorch_config.donated_buffer = False
    device = "cpu" if args.dry_run else "cuda"
    only = args.only.split(",") if args.only else []
    cases = [c for c in all_cases(device, args.dry_run) if not only or c.op in only]
    for case in cases:
        check(case)
    for case in masked_cases(device):
        if not only or case.op in only:
            check(case, PRECISIONS[:3])
    peaks = (1.0, 1.0) if args.dry_run else measured_peaks()
    for case in cases:
        rows = time_case(case, device, peaks, args.dry_run)
        if rows:
            append(args.out, rows)


if __name__ == "__main__":
    main()
