"""FLOPs per step and peak FLOP/s of the device for a run in progress, which logs its utilisation."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache

import torch
from comtip_kernels.rates import gpu_of

from comtip_fast.config.schema import RunConfig
from comtip_fast.models import CoMTIP
from comtip_fast.plan.engine import engine_of
from comtip_fast.plan.hardware import DEVICES, Device, make_cluster
from comtip_fast.plan.parts import step_parts
from comtip_fast.plan.plan import rank_share
from comtip_fast.plan.sizes import Inputs, UnknownBlocksError, sizes_of
from comtip_fast.training.protocol import StepCost

log = logging.getLogger("comtip_fast")


def step_cost(config: RunConfig, model: CoMTIP, *, tile_px: int, trained_genes: int, ranks: int) -> StepCost | None:
    """Return the cost of the run's steps on the device of ``model``, or None if the plan has no costs for its blocks.

    Parameters
    ----------
    config, model
        The run and its model.
    tile_px, trained_genes
        Side of a tile S, and number of genes in the identity table.
    ranks
        Number of ranks W.
    """
    device = next(model.parameters()).device
    gpu = device.type == "cuda"
    known = device_of(torch.cuda.get_device_name(device)) if gpu else None
    try:
        sizes = sizes_of(config, Inputs(tile_px=tile_px, trained_genes=trained_genes), model)
    except UnknownBlocksError:
        log.warning(
            "vision.backbone=%s: no costs are known for its blocks; FLOP/s and MFU are not logged",
            config.vision.backbone,
        )
        return None
    engine, cluster = engine_of(config, ranks, gpu), make_cluster("h100" if gpu else "cpu", per_node=ranks)

    @cache
    def flops(spots: int, genes: int) -> float:
        s = replace(sizes, B=spots, G=genes)
        return sum(p.sum("flops") + p.sum("back_flops") for p in step_parts(s, rank_share(s, engine, cluster)))

    peak = None if known is None else known.bf16 if engine.bf16 else known.fp32
    return StepCost(flops, peak)


def device_of(name: str) -> Device | None:
    """Return the hardware entry for a device name as CUDA reports it; None as in :func:`comtip_kernels.rates.gpu_of`."""
    gpu = gpu_of(name)
    return None if gpu is None else DEVICES[gpu]
