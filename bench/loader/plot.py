"""Draw docs/loader.png and fill the table in docs/data_loading.md from the results of ``bench/loader/compare.py``."""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
OURS, PEERS, LIMITS = "#1b6ca8", "#b9b9b9", "#e3a857"


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the header notes and the rows of a result file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    notes = [line[2:] for line in lines if line.startswith("# ")]
    return notes, list(csv.DictReader(line for line in lines if not line.startswith("#")))


def colour(name: str) -> str:
    """Return the colour of a contender's bar."""
    return OURS if name.startswith("comtip") else LIMITS if "decod" in name else PEERS


def table(
    notes: list[str], rows: list[dict[str, str]], ratios: list[dict[str, str]], memory: list[dict[str, str]]
) -> str:
    """Return the table as Markdown, with a description of the machine."""
    lines = ["| | spots/s | lowest to highest | CPU ms/spot | bytes read/spot |", "|---|---|---|---|---|"]
    for r in rows:
        low, high = float(r["lowest"]), float(r["highest"])
        lines.append(
            f"| {r['contender']} | {float(r['spots_per_s']):,.0f} | {low:,.0f} to {high:,.0f} | "
            f"{float(r['cpu_ms_per_spot']):.3f} | {int(r['bytes_per_spot']):,} |"
        )
    lines += ["", "| ratio, median over rounds | |", "|---|---|"]
    lines += [f"| {r['ratio']} | {float(r['value']):.2f} |" for r in ratios]
    for name in dict.fromkeys(r["loader"] for r in memory):
        mb = [float(r["resident_mb"]) for r in memory if r["loader"] == name]
        lines.append(
            f"| {name}: resident MB after epoch 5, after epoch {len(mb)} | {mb[min(4, len(mb) - 1)]:.0f}, {mb[-1]:.0f} |"
        )
    return "\n".join([*lines, "", f"*{notes[1]}; {notes[0]}*"])


def fill(page: Path, text: str) -> None:
    """Replace the table between its two markers."""
    begin, end = "<!-- loader table -->", "<!-- loader table end -->"
    head, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, tail = rest.partition(end)
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE, help="folder of the result files (default bench/loader)")
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE.parents[1] / "docs" / "loader.png",
        help="file of the figure (default docs/loader.png)",
    )
    page = HERE.parents[1] / "docs" / "data_loading.md"
    parser.add_argument(
        "--page", type=Path, default=page, help="Markdown page whose table is replaced (default docs/data_loading.md)"
    )
    args = parser.parse_args()
    notes, rows = read(args.results / "results.csv")
    _, memory = read(args.results / "memory.csv")
    _, ratios = read(args.results / "ratios.csv")
    fill(args.page, table(notes, rows, ratios, memory))
    fig, (bars, lines) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(2.4, 1), layout="constrained")
    rows.sort(key=lambda r: float(r["spots_per_s"]))
    for i, r in enumerate(rows):
        median, low, high = (float(r[k]) for k in ("spots_per_s", "lowest", "highest"))
        bars.barh(i, median, color=colour(r["contender"]))
        bars.plot([low, high], [i, i], color="black", lw=1)
        bars.text(high, i, f"  {median:,.0f}", va="center", fontsize=8)
    bars.set_yticks(range(len(rows)), [r["contender"] for r in rows], fontsize=8)
    bars.set_xlim(0, 1.12 * max(float(r["highest"]) for r in rows))
    bars.set_xlabel("spots per second: median of the rounds (line: lowest to highest)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (OURS, PEERS, LIMITS)]
    bars.legend(
        handles,
        ["tiles and levels ready, our order", "tiles and levels ready, theirs", "decoding alone"],
        loc="lower right",
        fontsize=8,
        frameon=False,
    )
    for name in dict.fromkeys(r["loader"] for r in memory):
        own = [r for r in memory if r["loader"] == name]
        lines.plot(
            [int(r["epoch"]) for r in own],
            [float(r["resident_mb"]) for r in own],
            label=name,
            color=OURS if "dali" in name else "#7fb3d5",
        )
    lines.set_ylim(0, None)
    lines.set_xlabel("epoch")
    lines.set_ylabel("resident memory, MB (free blocks returned)")
    lines.legend(fontsize=8, frameon=False, loc="lower right")
    for axes in (bars, lines):
        axes.spines[["top", "right"]].set_visible(False)
    fig.suptitle(notes[1] + "\n" + notes[0].split(";")[0], fontsize=8, color="#555555")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
