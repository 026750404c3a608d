"""``comtip plan --config FILE``: what a run will need and how long a step will take, before anything is run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comtip_fast.config.schema import RunConfig
    from comtip_fast.plan.hardware import Cluster
    from comtip_fast.plan.sizes import Inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, e.g. configs/8xh100.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the config")
    parser.add_argument("--json", action="store_true", help="print plain data instead of text")
    parser.add_argument("--brief", action="store_true", help="print only the lines that stand in configs/*.yaml")
    where = parser.add_argument_group("where it is to run")
    where.add_argument("--gpu", default="h100", help="h100 (default), h200, b200, a100-80, a100-40 or cpu")
    where.add_argument("--gpus", type=int, default=1, metavar="N", help="devices per node (default 1)")
    where.add_argument("--nodes", type=int, default=1, metavar="M", help="nodes (default 1)")
    where.add_argument("--link", help="inside a node: nvlink3, nvlink4, nvlink5, pcie4, pcie5, memory")
    where.add_argument("--fabric", help="between nodes: ib-hdr, ib-ndr, eth-100")
    data = parser.add_argument_group("facts of the data that the config does not hold")
    data.add_argument("--tile-px", type=int, default=224, metavar="S", help="side of a tile (default 224)")
    data.add_argument("--tile-kb", type=float, default=30.0, metavar="KB", help="size of an encoded tile (default 30)")
    data.add_argument("--trained-genes", type=int, metavar="N", help="default: genes.per_cohort")
    data.add_argument("--panel", type=int, metavar="G", help="genes of a step (default: panel.max_genes, the largest)")
    data.add_argument(
        "--loader-tiles-per-s", type=float, metavar="N", help="what the loader gives per node, if measured"
    )
    assumed = parser.add_argument_group("assumptions: shares of a peak, 0 to 1, and launches")
    assumed.add_argument("--compute-efficiency", type=float, default=0.5, metavar="X", help="of FLOP/s (default 0.5)")
    assumed.add_argument("--memory-efficiency", type=float, default=0.8, metavar="X", help="of bytes/s (default 0.8)")
    assumed.add_argument("--link-efficiency", type=float, default=0.8, metavar="X", help="of links (default 0.8)")
    assumed.add_argument("--launch-us", type=float, default=10.0, metavar="US", help="of one operation (default 10)")
    sweep = parser.add_argument_group("sweep over the number of devices")
    sweep.add_argument("--sweep", action="store_true", help="compare designs from 1 to --most devices")
    sweep.add_argument("--most", type=int, default=1024, metavar="N", help="the most devices (default 1024)")
    sweep.add_argument("--out", type=Path, help="folder for the sweep's figures and table")


def run(args: argparse.Namespace) -> int:
    """Predict and print; 1 if the run does not fit."""
    from comtip_fast.config.io import load_config
    from comtip_fast.plan.hardware import Efficiency, make_cluster
    from comtip_fast.plan.plan import at_mean_panel, make_plan
    from comtip_fast.plan.report import as_data, render, summary
    from comtip_fast.plan.sizes import Inputs

    config = load_config(args.config, args.set)
    shares = Efficiency(
        compute=args.compute_efficiency,
        memory=args.memory_efficiency,
        link=args.link_efficiency,
        launch_s=args.launch_us * 1e-6,
    )
    cluster = make_cluster(
        args.gpu, per_node=args.gpus, nodes=args.nodes, link=args.link, fabric=args.fabric, efficiency=shares
    )
    inputs = Inputs(
        tile_px=args.tile_px, tile_bytes=args.tile_kb * 1e3, trained_genes=args.trained_genes, panel=args.panel
    )
    if args.sweep:
        return _sweep(args, config, cluster, inputs)
    plan = make_plan(config, cluster, inputs, loader_tiles_per_s=args.loader_tiles_per_s)
    mean = at_mean_panel(plan, config) if args.panel is None else None
    if args.brief:
        print("\n".join(summary(plan, mean)))
    else:
        print(json.dumps(as_data(plan, mean), indent=1) if args.json else render(plan, mean))
    return 0 if plan.fits else 1


def _sweep(args: argparse.Namespace, config: RunConfig, cluster: Cluster, inputs: Inputs) -> int:
    """Compare designs over the number of devices: a table, plain data, or figures and a table in a folder."""
    from comtip_fast.plan.figures import write
    from comtip_fast.plan.sweep import as_rows, sweep, table

    found = sweep(config, cluster, inputs, most=args.most)
    if args.out is not None:
        for path in write(found, args.out):
            print(path)
    else:
        print(json.dumps(as_rows(found), indent=1) if args.json else table(found))
    return 0
