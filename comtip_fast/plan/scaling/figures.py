"""Write the table of a sweep, and figures of speed and memory against the number of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from comtip_shards.storage.atomic import write_atomic

matplotlib.use("Agg")
from comtip_shards.storage.atomic import atomic_path
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

from comtip_fast.plan.scaling.sweep import DESIGNS, Growth, Point, Sweep, scales_to, table

# Colour-blind safe (Okabe and Ito). The colour shows the table, the dash the loss form.
COLOURS = ("#D55E00", "#D55E00", "#0072B2", "#0072B2", "#009E73", "#E69F00", "#CC79A7")
DASHES = ("-", (0, (4, 2)), "-", (0, (4, 2)), "-", "-", "-")
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.dpi": 200,
}


def _set_device_axis(axes: Any, max_devices: int) -> None:
    """Set a logarithmic axis of devices, with ticks at powers of 2 up to ``max_devices``."""
    axes.set_xscale("log", base=2)
    ticks = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) if n <= max_devices]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("devices")
    axes.tick_params(axis="x", labelsize=8)


def _max_devices(result: Sweep) -> int:
    return max(p.devices for p in result.points)


def draw_speed(result: Sweep, path: Path) -> None:
    """Plot the speed of the DDP designs: spots per second under strong scaling, and per device under weak scaling.

    A circle marks where scaling stops.
    """
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9.2, 4.0), layout="constrained")
        titles = (
            ("strong", f"Same batch, B = {result.batch:,}"),
            ("weak", f"{result.per_device:,} spots per device: B and negatives grow"),
        )
        for axes, (growth, title) in zip(panels, titles, strict=True):
            _speed_panel(result, axes, growth)  # type: ignore[arg-type]
            axes.set_title(title, loc="left")
        panels[0].set_yscale("log")
        panels[0].set_ylabel("spots per second (predicted)")
        panels[1].set_ylim(bottom=0)
        panels[1].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        panels[1].set_ylabel("spots per second and device (predicted)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8.5)
        with atomic_path(path) as tmp_path:
            figure.savefig(tmp_path, format=path.suffix[1:])
        plt.close(figure)


def _speed_panel(result: Sweep, axes: Any, growth: Growth) -> None:
    """Plot the speed of the DDP designs, and mark where each stops scaling."""
    chosen = DESIGNS[:4]

    def height(p: Point) -> float:
        return p.mean.spots_per_s / (p.devices if growth == "weak" else 1)

    if growth == "strong":
        first = result.line(growth, chosen[0])
        ideal = [first[0].mean.spots_per_s * p.devices for p in first]
        axes.plot([p.devices for p in first], ideal, color="#999999", lw=1, ls=":", label="ideal scaling")
    for design, colour, dash in zip(chosen, COLOURS, DASHES, strict=False):
        line = result.line(growth, design)
        axes.plot(
            [p.devices for p in line], [height(p) for p in line], color=colour, ls=dash, lw=1.8, label=design.name
        )
        last = next(p for p in line if p.devices == scales_to(line))
        if last is not line[-1]:
            axes.plot(last.devices, height(last), "o", ms=5.5, mfc="white", mec=colour, mew=1.6, zorder=5)
    axes.plot(
        [],
        [],
        "o",
        ms=5.5,
        mfc="white",
        mec="#444444",
        mew=1.6,
        ls="none",
        label="scaling stops (last doubling < 1.5 x)",
    )
    _set_device_axis(axes, _max_devices(result))


def draw_memory(result: Sweep, path: Path) -> None:
    """Plot memory under weak scaling: model state by ZeRO stage, loss buffers by loss form, and the total of DDP designs."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(11.4, 3.7), layout="constrained")
        _state_panel(result, panels[0])
        _loss_panel(result, panels[1])
        _total_panel(result, panels[2])
        for axes in panels:
            _set_device_axis(axes, _max_devices(result))
            axes.tick_params(axis="x", labelsize=7)
        for axes in (panels[0], panels[2]):
            axes.set_ylim(0, axes.get_ylim()[1] * 1.25)
        panels[1].set_yscale("log")
        panels[1].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        panels[0].legend(fontsize=8, loc="upper right")
        panels[1].legend(fontsize=8, loc="upper left")
        panels[2].legend(fontsize=8, loc="upper center", ncols=3, columnspacing=1.0, handlelength=1.6)
        panels[0].set_ylabel("GB per device (predicted)")
        with atomic_path(path) as tmp_path:
            figure.savefig(tmp_path, format=path.suffix[1:])
        plt.close(figure)


def _plot(axes: Any, line: list[Point], values: list[float], index: int, label: str) -> None:
    """Plot bytes in GB against devices, in the style of design ``index``."""
    axes.plot(
        [p.devices for p in line],
        [v / 1e9 for v in values],
        color=COLOURS[index],
        ls=DASHES[index],
        lw=1.8,
        label=label,
    )


def _state_panel(result: Sweep, axes: Any) -> None:
    """Plot the model state, see :func:`_is_state`, by ZeRO stage."""
    axes.set_title("Parameters, gradients, optimizer", loc="left")
    for index, label in ((2, "DDP"), (4, "ZeRO 1 and 2"), (6, "ZeRO 3")):
        line = result.line("weak", DESIGNS[index])
        state = [sum(r.bytes for r in p.largest.memory if _is_state(r.name)) for p in line]
        _plot(axes, line, state, index, label)


def _is_state(name: str) -> bool:
    """Return whether a row of the memory table is model state: trained parameters (not gathered), gradients or moments."""
    return name.startswith(("parameters", "gradients", "AdamW")) and "gathered" not in name


def _loss_panel(result: Sweep, axes: Any) -> None:
    """Plot the buffers of InfoNCE by loss form."""
    axes.set_title("Buffers of the contrastive loss", loc="left")
    for index, label in ((2, "gather: all images"), (3, "ring: blocks in transfer")):
        line = [p for p in result.line("weak", DESIGNS[index]) if p.devices > 1]
        _plot(
            axes,
            line,
            [sum(r.bytes for r in p.largest.memory if r.name.startswith("loss")) for p in line],
            index,
            label,
        )


def _total_panel(result: Sweep, axes: Any) -> None:
    """Plot the total memory of three DDP designs and the capacity of the device."""
    axes.set_title("Total, largest panel", loc="left")
    for index, label in ((0, "whole table"), (2, "sharded, gather"), (3, "sharded, ring")):
        line = result.line("weak", DESIGNS[index])
        _plot(axes, line, [p.largest.device_bytes for p in line], index, label)
    capacity = result.cluster.device.memory / 1e9
    axes.axhline(capacity, color="#444444", lw=1, ls=":")
    axes.annotate(
        f"{result.cluster.device.name}: {capacity:g} GB",
        (16, capacity),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
    )


def write(result: Sweep, folder: Path) -> list[Path]:
    """Write the table and the two figures; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "scaling_table.md", folder / "scaling_speed.png", folder / "scaling_memory.png"]
    write_atomic(paths[0], table(result) + "\n")
    draw_speed(result, paths[1])
    draw_memory(result, paths[2])
    return paths
