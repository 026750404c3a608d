"""``comtip plan --config FILE``: estimate memory, traffic and step time of a run without running it."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from comtip_fast.cli.options import out_folder, refuse_unused

if TYPE_CHECKING:
    from comtip_fast.config.schema import RunConfig
    from comtip_fast.plan.hardware import Cluster, Efficiency
    from comtip_fast.plan.sizes import Inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``comtip plan``."""
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, e.g. configs/8xh100.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the config")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--brief", action="store_true", help="print only the summary, as in the headers of configs/*.yaml"
    )
    where = parser.add_argument_group("hardware")
    where.add_argument(
        "--gpu", dest="device", default="h100", help="device: h100 (default), h200, b200, a100-80, a100-40 or cpu"
    )
    where.add_argument("--gpus", type=int, default=1, metavar="N", help="devices per node (default 1)")
    where.add_argument("--nodes", type=int, default=1, metavar="M", help="nodes (default 1)")
    where.add_argument(
        "--link", help="link inside a node: nvlink3, nvlink4, nvlink5, pcie4, pcie5 or memory (default: the device's)"
    )
    where.add_argument("--fabric", help="network between nodes: ib-hdr, ib-ndr or eth-100 (default: the device's)")
    data = parser.add_argument_group("properties of the data that are not in the config")
    data.add_argument("--tile-px", type=int, metavar="S", help="side of a tile in px (default: data.tile_px, or 224)")
    data.add_argument(
        "--tile-kb", type=float, default=30.0, metavar="KB", help="size of an encoded tile in kB (default 30)"
    )
    data.add_argument(
        "--trained-genes", type=int, metavar="N", help="trained genes (default: genes.per_cohort, or 10,000 if it is 0)"
    )
    data.add_argument("--panel", type=int, metavar="G", help="genes per step (default: panel.max_genes)")
    data.add_argument(
        "--loader-tiles-per-s", type=float, metavar="N", help="measured throughput of the loader per node, if known"
    )
    data.add_argument(
        "--validation-spots",
        type=int,
        metavar="N",
        help="spots that a validation scores (default: train.validate_spots)",
    )
    assumed = parser.add_argument_group("assumptions: achieved shares of peak rates (0 to 1), launch time, loading")
    assumed.add_argument(
        "--compute-efficiency", type=float, default=0.5, metavar="X", help="share of peak FLOP/s (default 0.5)"
    )
    assumed.add_argument(
        "--memory-efficiency", type=float, default=0.8, metavar="X", help="share of memory bandwidth (default 0.8)"
    )
    assumed.add_argument(
        "--link-efficiency", type=float, default=0.8, metavar="X", help="share of link bandwidth (default 0.8)"
    )
    assumed.add_argument(
        "--launch-us", type=float, default=10.0, metavar="US", help="launch time of an operation in us (default 10)"
    )
    assumed.add_argument(
        "--loader-cores", type=int, default=12, metavar="N", help="CPU cores per device that load tiles (default 12)"
    )
    assumed.add_argument(
        "--tile-ms", type=float, default=1.0, metavar="MS", help="CPU time to load a tile of 224 px in ms (default 1)"
    )
    sweep = parser.add_argument_group("sweep over the number of devices")
    sweep.add_argument("--sweep", action="store_true", help="compare designs from 1 to --most devices")
    sweep.add_argument("--most", type=int, metavar="N", help="maximum number of devices (default 1024)")
    sweep.add_argument("--out", type=Path, help="folder for the sweep's figures and table")


def run(args: argparse.Namespace) -> int:
    """Print the plan, and return 1 if the run does not fit into memory; with ``--sweep``, compare designs and return 0."""
    from comtip_fast.config.io import load_config
    from comtip_fast.plan.hardware import make_cluster
    from comtip_fast.plan.plan import at_mean_panel, make_plan
    from comtip_fast.plan.report import as_data, render, summary
    from comtip_fast.plan.sizes import Inputs

    _refuse_unused(args)
    if args.out is not None:
        out_folder(args)
    config = load_config(args.config, args.set)
    efficiency = _efficiency(args)
    cluster = make_cluster(
        args.device, per_node=args.gpus, nodes=args.nodes, link=args.link, fabric=args.fabric, efficiency=efficiency
    )
    stated = config.data.tile_px
    if None not in (stated, args.tile_px) and stated != args.tile_px:
        raise ValueError(f"--tile-px {args.tile_px}: the config states data.tile_px={stated}; leave one of them out")
    if not 0 < args.tile_kb < math.inf:
        raise ValueError(f"--tile-kb {args.tile_kb:g}: must be a finite number above 0; leave it out for the default")
    inputs = Inputs(
        tile_px=args.tile_px if args.tile_px is not None else stated or 224,
        tile_bytes=args.tile_kb * 1e3,
        trained_genes=args.trained_genes,
        panel=args.panel,
    )
    if args.sweep:
        return _sweep(args, config, cluster, inputs)
    plan = make_plan(
        config,
        cluster,
        inputs,
        loader_tiles_per_s=args.loader_tiles_per_s,
        validation_spots=args.validation_spots,
    )
    mean = at_mean_panel(plan, config) if args.panel is None else None
    if args.brief:
        print("\n".join(summary(plan, mean)))
    else:
        print(json.dumps(as_data(plan, mean), indent=1) if args.json else render(plan, mean))
    return 0 if plan.fits else 1


def _efficiency(args: argparse.Namespace) -> Efficiency:
    """Return the assumptions; raise ValueError for the first option whose value is out of bounds."""
    from comtip_fast.plan.hardware import Efficiency

    for name in ("compute_efficiency", "memory_efficiency", "link_efficiency"):
        share = getattr(args, name)
        if not 0 < share <= 1:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {share}: give a share of the peak rate, above 0 and at most 1")
    if not 0 <= args.launch_us < math.inf:
        raise ValueError(f"--launch-us {args.launch_us:g}: give a finite number of microseconds of at least 0")
    if args.loader_cores < 1:
        raise ValueError(f"--loader-cores {args.loader_cores}: give at least one core")
    if not 0 < args.tile_ms < math.inf:
        raise ValueError(f"--tile-ms {args.tile_ms:g}: give a finite time above 0")
    return Efficiency(
        compute=args.compute_efficiency,
        memory=args.memory_efficiency,
        link=args.link_efficiency,
        launch_s=args.launch_us * 1e-6,
        cores=args.loader_cores,
        tile_ms=args.tile_ms,
    )


def _refuse_unused(args: argparse.Namespace) -> None:
    """Raise ValueError for options that the chosen output does not use."""
    if args.sweep:
        alone = {
            "--brief": args.brief,
            "--loader-tiles-per-s": args.loader_tiles_per_s,
            "--validation-spots": args.validation_spots,
        }
        refuse_unused(alone, "a sweep compares designs instead of printing one plan (--sweep)")
        if args.out is not None:
            refuse_unused({"--json": args.json}, "a sweep writes its table to --out")
        return
    refuse_unused({"--most": args.most, "--out": args.out}, "used with --sweep only")
    if args.brief:
        refuse_unused({"--json": args.json}, "--brief prints text")


def _sweep(args: argparse.Namespace, config: RunConfig, cluster: Cluster, inputs: Inputs) -> int:
    """Compare designs over the number of devices; print a table or JSON, or write figures and a table to a folder."""
    from comtip_fast.plan.scaling.figures import write
    from comtip_fast.plan.scaling.sweep import as_rows, sweep, table

    found = sweep(config, cluster, inputs, most=1024 if args.most is None else args.most)
    if args.out is not None:
        for path in write(found, args.out):
            print(path)
    else:
        print(json.dumps(as_rows(found), indent=1) if args.json else table(found))
    return 0
