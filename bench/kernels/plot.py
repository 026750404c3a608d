"""Plot bytes and FLOPs of every operation relative to its lower bound, and print the tables of kernels/README.md.

    python bench/kernels/plot.py [--sizes bench/traffic.csv] [--out kernels/floors.png]

Nothing is measured: bytes and FLOPs are counted, and times are predicted by a roofline model.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from comtip_kernels.ledger.alternatives import attention_tiles, pooling_ways
from comtip_kernels.ledger.sizes import ROOFS
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
BLUE, ORANGE, GREEN, PINK, GRAY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#7f7f7f"
HEAD = (
    "operation",
    "size",
    "MB moved",
    "x floor",
    "L2 MB",
    "x floor",
    "GFLOP",
    "of these again",
    "x floor",
    "programs",
    "A100 µs",
    "H100 µs",
)
HEAD += ("compute", "L2", "memory")


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a csv table."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def flop_ratio(row: dict[str, str]) -> float | None:
    """Return FLOPs relative to the lower bound, None for operations without products."""
    floor = float(row["floor_gflop"])
    return float(row["gflop"]) / floor if floor else None


def table(rows: list[dict[str, str]]) -> str:
    """Return the table of operations, with predicted times, as Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|" + "---:|" * 13]
    for r in rows:
        ratio = flop_ratio(r)
        again = float(r["recomputed_gflop"])
        flops = ("", "", "")
        if ratio is not None:
            flops = (f"{float(r['gflop']):,.0f}", f"{again:,.0f}" if again else "", f"{ratio:.2f}")
        cells = (
            f"`{r['op']}` {r['part']}",
            r["size"],
            f"{float(r['memory_mb']):,.0f}",
            f"{float(r['memory_ratio']):.2f}",
            f"{float(r['loaded_mb']):,.0f}",
            f"{float(r['loaded_ratio']):.2f}",
            *flops,
            f"{int(r['programs']):,}",
            f"{int(r['predicted_us_a100']):,}",
            f"{int(r['predicted_us_h100']):,}",
            *(_share(r, roof) for roof in ("compute", "l2", "memory")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _share(row: dict[str, str], roof: str) -> str:
    """Return the share of the predicted H100 time that one roof alone would take; that of the limiting roof is bold."""
    text = f"{float(row[f'{roof}_us_h100']) / float(row['predicted_us_h100']):.0%}".replace("%", " %")
    return f"**{text}**" if row["bound_h100"] == roof else text


def kernels_table(rows: list[dict[str, str]], triton: str = "3.8.0") -> str:
    """Return the table of bf16 kernels as Markdown, with the values of sm_80, sm_90 and sm_100 in one row."""
    by_kernel: dict[str, dict[str, dict[str, str]]] = {}
    for r in rows:
        if r["triton"] == triton and r["name"].endswith("_bf16"):
            by_kernel.setdefault(f"`{r['op']}` {r['name'].removesuffix('_bf16')}", {})[r["arch"]] = r
    columns = ("registers", "shared_kib", "resident", "tensor", "loads_128", "async_copies", "spills")
    head = ("kernel, bf16", "registers", "shared KiB", "programs per multiprocessor", "tensor cores")
    lines = [
        "| " + " | ".join((*head, "128-bit loads", "async copies", "spills")) + " |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kernel, archs in by_kernel.items():
        of = {a: r | {"tensor": f"{r['mma']} {r['mma_shape'].strip('-')}".strip()} for a, r in archs.items()}
        cells = [" / ".join(of[a][c] for a in ("80", "90", "100")) for c in columns]
        lines.append("| " + " | ".join((kernel, *cells)) + " |")
    return "\n".join(lines) + "\n"


def ways_table(G: int = 2048, Q: int = 32, D: int = 512, spots: tuple[int, ...] = (4096, 1024, 128)) -> str:
    """Return the table of the ways to compute ``table_pool`` with its gradients on an H100, as Markdown."""
    lines = ["| B | way | GFLOP | L2 MB | memory MB | compute µs | L2 µs | memory µs |", "|---:|---|" + "---:|" * 6]
    for B in spots:
        ways = {
            way: {roof: s * 1e6 for roof, s in way.seconds(ROOFS["h100"]).items()} for way in pooling_ways(B, G, Q, D)
        }
        best = min(max(roofs.values()) for roofs in ways.values())
        for way, roofs in ways.items():
            slowest = max(roofs.values())
            times = [
                f"{s:,.0f}" if s < slowest else f"**{s:,.0f}**" if s == best else f"*{s:,.0f}*" for s in roofs.values()
            ]
            moved = (
                f"{way.moved.flops / 1e9:,.0f}",
                f"{way.moved.loaded / 1e6:,.0f}",
                f"{way.moved.memory / 1e6:,.0f}",
            )
            lines.append("| " + " | ".join((f"{B:,}", way.name, *moved, *times)) + " |")
    return "\n".join(lines) + "\n"


def tiles_table(shortest: int = 3, longest: int = 16, sentences: int = 256_000, heads: int = 8) -> str:
    """Return the table of tiles of packed attention, as Markdown."""
    lengths = range(shortest, longest + 1)
    lines = ["| tiles | pairs computed / pairs within sentences | programs |", "|---|---:|---:|"]
    for way in attention_tiles(lengths, sentences // len(lengths), heads):
        lines.append(f"| {way.name} | {way.ratio:.2f} | {way.programs:,} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, str]], out: Path) -> None:
    """Draw ratios to the lower bounds on the left and predicted times on the right, and write the figure to ``out``."""
    bottom_up = rows[::-1]
    names = [f"{r['op']}  {r['part']}\n{r['size']}" for r in bottom_up]
    y = range(len(bottom_up))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 0.52 * len(bottom_up) + 1.2), sharey=True, layout="constrained"
    )
    bars = (
        ("bytes from and to memory", BLUE, [float(r["memory_ratio"]) for r in bottom_up]),
        ("bytes that cross L2", GRAY, [float(r["loaded_ratio"]) for r in bottom_up]),
        ("FLOPs, including padding and masks", ORANGE, [flop_ratio(r) or 0 for r in bottom_up]),
    )
    for offset, (label, color, ratios) in zip((0.27, 0.0, -0.27), bars, strict=True):
        left.barh([v + offset for v in y], ratios, 0.26, color=color, label=label)
        for v, ratio in zip(y, ratios, strict=True):
            if ratio:
                left.text(ratio * 1.03, v + offset, f"{ratio:.2f}", va="center", fontsize=6)
    left.axvline(1, color="black", lw=0.8)
    left.set(xscale="log", xlim=(0.7, 110), xlabel="times the floor (1 is the floor)", yticks=list(y))
    left.set_yticklabels(names, fontsize=7.5)
    ticks = [1, 2, 5, 10, 32]
    left.set_xticks(ticks, [str(t) for t in ticks])
    left.minorticks_off()
    for gpu, color, offset in (("a100", GREEN, 0.2), ("h100", PINK, -0.2)):
        ms = [float(r[f"predicted_us_{gpu}"]) / 1e3 for r in bottom_up]
        right.barh([v + offset for v in y], ms, 0.38, color=color, label=gpu.upper())
        for v, value in zip(y, ms, strict=True):
            right.text(value * 1.06, v + offset, f"{value:.2g}", va="center", fontsize=7)
    right.set(xscale="log", xlim=(0.003, 60), xlabel="predicted ms under the lowest roof (not measured)")
    left.set_ylim(-1.5, len(bottom_up) - 0.4)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Draw the figure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes",
        type=Path,
        default=ROOT / "bench/traffic.csv",
        help="table of sizes, with ledger.csv next to it (default bench/traffic.csv)",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "kernels/floors.png", help="figure to write (default kernels/floors.png)"
    )
    args = parser.parse_args()
    rows = read(args.sizes)
    draw(rows, args.out)
    print(table(rows))
    print(ways_table())
    print(tiles_table())
    print(kernels_table(read(args.sizes.with_name("ledger.csv"))), end="")


if __name__ == "__main__":
    main()
