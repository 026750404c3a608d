"""A plan as text and as plain data."""

from __future__ import annotations

import math
from typing import Any

from comtip_fast.plan.cost import Precision
from comtip_fast.plan.plan import FILL, Plan


def size(n: float) -> str:
    """Format bytes with a decimal prefix."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= one:
            return f"{n / one:.3g} {unit}" if n < 999.5 * one else f"{n / one:.0f} {unit}"
    return f"{n:.0f} B"


def seconds(t: float) -> str:
    """Format a duration in s, ms or us."""
    for unit, one in (("s", 1.0), ("ms", 1e-3)):
        if t >= one:
            return f"{t / one:.3g} {unit}"
    return f"{t * 1e6:.3g} us"


def flops(n: float) -> str:
    """Format FLOPs with a decimal prefix."""
    for unit, one in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if n >= one:
            return f"{n / one:.3g} {unit}"
    return f"{n:.0f} FLOP"


def precision_name(p: Precision) -> str:
    """Return the name of a precision for reports."""
    return "bf16 over fp32 weights" if p.is_bf16 else "fp32"


def render(plan: Plan, mean: Plan | None = None) -> str:
    """Return the plan as text; ``mean`` is the plan of a step with the mean panel."""
    blocks = [_head(plan), _memory(plan), _compute(plan), _traffic(plan), _times(plan, mean), _assumed(plan)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def summary(plan: Plan, mean: Plan | None = None) -> list[str]:
    """Return the lines of the summary in ``configs/*.yaml``; a CPU has no times there, because its peak rate is assumed."""
    c, e, s = plan.cluster, plan.engine, plan.sizes
    devices = f"{c.nodes} x {c.per_node} x {c.device.name}" if c.nodes > 1 else f"{c.per_node} x {c.device.name}"
    lines = [
        f"predicted, {devices}, {e.name}, {precision_name(e.precision)}:",
        f"  {size(plan.device_bytes)} of {size(c.device.memory)} per device with the largest panel (G = {s.G:,})",
        f"  {s.trained / 1e6:.1f} M parameters to train; {flops(plan.flops)} per device and step",
    ]
    if c.device.name == "cpu":
        return lines
    lines.append(f"  {seconds(plan.step_seconds)} per step, {plan.spots_per_s:,.0f} spots/s")
    if mean is not None and mean.sizes.G != s.G:
        usual = (
            f"{seconds(mean.step_seconds)}, {mean.spots_per_s:,.0f} spots/s with the mean panel (G = {mean.sizes.G:,})"
        )
        lines[-1] += f"; {usual}"
    if c.ranks > 1:
        link, fabric = (sum(t.on_links(c)[i] for t in plan.traffic) for i in (0, 1))
        between = f", {size(fabric)} over {c.fabric.name}" if c.nodes > 1 else ""
        lines.append(f"  {size(link)} per device and step over {c.link.name}{between}")
    return lines


def _head(plan: Plan) -> list[str]:
    """Return the lines on cluster, engine and sizes."""
    c, e, s, w = plan.cluster, plan.engine, plan.sizes, plan.share
    return [
        f"{plan.name}: all figures are PREDICTED from the config, nothing was run (formulas: docs/scaling.md)",
        (
            f"  {c.nodes} node(s) x {c.per_node} x {c.device.name}, {e.name}, {precision_name(e.precision)}, loss form {e.loss_form}, "
            f"table {'sharded' if e.shares_table(s.G * s.Q, c.ranks) else 'replicated'}"
        ),
        (
            f"  B = {s.B:,} spots ({w.spots:,} per rank, {w.micro_batch_spots:,} per micro-batch), P = {s.P} patches, G = {s.G:,} "
            f"genes, Q = {s.Q}, {s.tokens:.1f} tokens per sentence, D = {s.D}"
        ),
        "  trained parameters: "
        + ", ".join(f"{g.name} {g.trained / 1e6:.2f} M" for g in s.groups if g.trained)
        + f"; {s.trained / 1e6:.2f} M in total",
    ]


def _memory(plan: Plan) -> list[str]:
    """Return the memory table."""
    lines = ["memory per rank (predicted)"]
    for row in plan.memory:
        where = "" if row.where == "device" else f"  in {row.where} memory" if row.where == "host" else "  on NVMe"
        note = f"  ({row.note})" if row.note else ""
        lines.append(f"  {row.name:<50}{size(row.bytes):>10}{where}{note}")
    total, capacity = plan.device_bytes, plan.cluster.device.memory
    verdict = "fits" if plan.fits else f"DOES NOT FIT: {FILL:.0%} of {size(capacity)} is usable for tensors"
    share = f"{total / capacity:.0%} of {size(capacity)}"
    return [*lines, f"  {'total on the device':<50}{size(total):>10}  {share}: {verdict}"]


def _compute(plan: Plan) -> list[str]:
    """Return the table of FLOPs and bytes moved."""
    lines = ["computation per rank and step (predicted)", f"  {'':<28}{'forward':>14}{'backward':>14}{'moved':>12}"]
    for p in plan.parts:
        moved = p.sum("moved") + p.sum("back_moved")
        lines.append(f"  {p.name:<28}{flops(p.sum('flops')):>14}{flops(p.sum('back_flops')):>14}{size(moved):>12}")
    return [*lines, f"  {'total':<28}{flops(plan.flops):>14}"]


def _traffic(plan: Plan) -> list[str]:
    """Return the table of collectives; empty for one rank."""
    if not plan.traffic:
        return []
    c = plan.cluster
    lines = [
        "communication per device and step (predicted)",
        f"  {'':<44}{'kind':<16}{'sent':>10}{c.link.name:>12}{c.fabric.name if c.nodes > 1 else '':>12}",
    ]
    for t in plan.traffic:
        link, fabric = t.on_links(c)
        between = size(fabric) if c.nodes > 1 else ""
        lines.append(
            f"  {t.part + ': ' + t.what:<44}{t.kind:<16}{size(t.sent(c.ranks)):>10}{size(link):>12}{between:>12}"
        )
    return lines


def _times(plan: Plan, mean: Plan | None) -> list[str]:
    """Return the time table, and the lines on loader, host and validation."""
    lines = ["time per step (predicted)"]
    for t in plan.times:
        hidden = f"  (and {seconds(t.hidden)} overlapped with computation)" if t.hidden > 0 else ""
        lines.append(f"  {t.name:<28}{seconds(t.seconds):>10}{t.seconds / plan.step_seconds:>6.0%}  {t.bound}{hidden}")
    lines.append(
        f"  {'total':<28}{seconds(plan.step_seconds):>10}        {plan.spots_per_s:,.0f} spots/s, {plan.utilisation:.0%} of peak"
    )
    if mean is not None and mean.sizes.G != plan.sizes.G:
        lines.append(
            f"  {f'with the mean panel, G = {mean.sizes.G:,}':<28}{seconds(mean.step_seconds):>10}        {mean.spots_per_s:,.0f} spots/s"
        )
    typical = mean or plan
    required = (
        f"{typical.loader.tiles_per_s:,.0f} tiles/s per node, {size(typical.loader.bytes_per_s)}/s of encoded tiles"
    )
    if not plan.sizes.loads_tiles:
        required = "no tiles, the frozen stem's features are in memory (data.stem_features)"
    lines.append(f"  required of the loader: {required}")
    return [*lines, *_host(plan), *_loader(typical), *_validation(plan)]


def _host(plan: Plan) -> list[str]:
    """Return the line on the host's time; empty for a CPU, where this time is part of each operation."""
    if plan.cluster.device.name == "cpu":
        return []
    issued = f"  host: {plan.operators:,} operators and {plan.launches:,} launches in {seconds(plan.host_seconds)}"
    if plan.engine.compiled:
        return [f"{issued} without engine.compile, which issues fewer"]
    waits = {t.name for t in plan.times}
    limits = "wait: host" in waits and "wait: loader" not in waits
    return [f"{issued}: it {'limits' if limits else 'does not limit'} the step"]


def _loader(plan: Plan) -> list[str]:
    """Return the line on the rate of the loader; empty on a CPU without a measured rate."""
    available = plan.loader.available_tiles_per_s
    if available is None:
        return []
    f = plan.cluster.efficiency
    source = "measured" if plan.loader.measured else f"{f.cores} cores per device, {f.tile_ms:g} ms per tile of 224 px"
    enough = "enough" if available >= plan.loader.tiles_per_s else "the loader limits the step"
    return [f"  available from it: {available:,.0f} tiles/s per node ({source}): {enough}"]


def _validation(plan: Plan) -> list[str]:
    """Return the line on validation; empty without validation."""
    v = plan.validation
    if v is None:
        return []
    share = v.seconds / (v.seconds + v.every * plan.step_seconds)
    return [f"  validation of {v.spots:,} spots: {seconds(v.seconds)} every {v.every} steps, {share:.1%} of the run"]


def _assumed(plan: Plan) -> list[str]:
    """Return the lines on assumed efficiencies and vendor rates."""
    f, c, i = plan.cluster.efficiency, plan.cluster, plan.inputs
    device, link, fabric = c.device, c.link, c.fabric
    return [
        f"assumed: {f.compute:.0%} of the peak in matrix products, {f.memory:.0%} of memory bandwidth, {f.link:.0%} of links,",
        f"  {seconds(f.launch_s)} to launch an operation; tiles of {i.tile_px} px, {size(i.tile_bytes)} each;",
        (
            f"  {device.name}: {device.bf16 / 1e12:g} TFLOP/s bf16, {device.fp32 / 1e12:g} fp32, "
            f"{size(device.memory_bytes_per_s)}/s of memory"
            + (f", {size(device.l2_bytes_per_s)}/s of L2;" if device.l2_bytes_per_s < math.inf else ";")
        ),
        f"  {link.name} {size(link.bytes_per_s)}/s and {fabric.name} {size(fabric.bytes_per_s)}/s per device",
    ]


def as_data(plan: Plan, mean: Plan | None = None) -> dict[str, Any]:
    """Return the plan as plain data for ``--json``, in bytes, FLOPs and seconds."""
    c = plan.cluster
    return {
        "predicted": True,
        "name": plan.name,
        **_assumptions(plan),
        "memory": [{"name": r.name, "bytes": r.bytes, "where": r.where, "lasts": r.lasts} for r in plan.memory],
        "device_bytes": plan.device_bytes,
        "fits": plan.fits,
        "parts": [
            {"name": p.name} | {k: p.sum(k) for k in ("flops", "back_flops", "moved", "back_moved")} | {"kept": p.saved}
            for p in plan.parts
        ],
        "traffic": [
            {
                "part": t.part,
                "what": t.what,
                "kind": t.kind,
                "sent": t.sent(c.ranks),
                "link": t.on_links(c)[0],
                "fabric": t.on_links(c)[1],
            }
            for t in plan.traffic
        ],
        "times": [{"name": t.name, "seconds": t.seconds, "bound": t.bound, "hidden": t.hidden} for t in plan.times],
        "step_seconds": plan.step_seconds,
        "spots_per_s": plan.spots_per_s,
        "utilisation": plan.utilisation,
        "loader": {
            "tiles_per_s": plan.loader.tiles_per_s,
            "bytes_per_s": plan.loader.bytes_per_s,
            "available_tiles_per_s": plan.loader.available_tiles_per_s,
        },
        "host": {"operators": plan.operators, "launches": plan.launches, "seconds": plan.host_seconds},
        "validation": None
        if plan.validation is None
        else {"spots": plan.validation.spots, "seconds": plan.validation.seconds, "every": plan.validation.every},
        "mean_panel": None
        if mean is None
        else {"G": mean.sizes.G, "step_seconds": mean.step_seconds, "spots_per_s": mean.spots_per_s},
    }


def _assumptions(plan: Plan) -> dict[str, Any]:
    """Return the inputs of a plan: cluster, assumed rates and sizes, engine and model."""
    c, e, s = plan.cluster, plan.engine, plan.sizes
    return {
        "cluster": {
            "device": c.device.name,
            "per_node": c.per_node,
            "nodes": c.nodes,
            "link": c.link.name,
            "fabric": c.fabric.name,
        },
        "assumed": {
            "compute": c.efficiency.compute,
            "memory": c.efficiency.memory,
            "link": c.efficiency.link,
            "launch_s": c.efficiency.launch_s,
            "loader_cores": c.efficiency.cores,
            "tile_ms": c.efficiency.tile_ms,
            "tile_px": plan.inputs.tile_px,
            "tile_bytes": plan.inputs.tile_bytes,
            "sentence_tokens": s.tokens,
        },
        "engine": {
            "kind": e.kind,
            "zero_stage": e.zero_stage,
            "bf16": e.bf16,
            "loss_form": e.loss_form,
            "shard_table": e.shard_table,
            "micro_batches": e.micro_batches,
            "activation_checkpointing": e.activation_checkpointing,
        },
        "sizes": {
            "B": s.B,
            "b": plan.share.spots,
            "P": s.P,
            "G": s.G,
            "Q": s.Q,
            "D": s.D,
            "parameters": s.trained,
            "frozen": s.frozen,
        },
    }
