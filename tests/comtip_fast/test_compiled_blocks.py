"""``engine.compile``: a block is compiled once in each gradient mode, whatever the sizes of pieces, masks and panels are."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from comtip_fast.config.io import load_config
from comtip_fast.models import recompute
from comtip_fast.models.image_encoder import VisionEncoder
from comtip_fast.training.engines.torch import TorchEngine
from testkit.rehearsal.record import ROOT

SMALL = ["vision.backbone=small", "vision.width=16", "vision.heads=2", "vision.depth=2", "vision.patch_px=8"]
PIECES = (5, 3, 4)
"""Spots of the pieces of a batch: unequal, as where ``engine.micro_batches`` does not divide it."""


@pytest.fixture
def encoder() -> Iterator[VisionEncoder]:
    torch.compiler.reset()
    counters.clear()
    built = VisionEncoder(load_config(None, SMALL).vision, 32)
    for block in built.blocks:
        block.compile(backend="eager")
    yield built
    torch.compiler.reset()


def take_steps(encoder: VisionEncoder) -> None:
    """Encode whole pieces without gradients, and with their visible patches with gradients, and a section for validation."""
    encoder.train()
    for grad in (False, True):
        for n in PIECES:
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
                tiles = encoder.stem_features(torch.zeros(n, 3, 32, 32, dtype=torch.uint8))
                visible = torch.arange(7).expand(n, -1)
                if grad:
                    out = [tokens.pooled_Bd for tokens in encoder.encode_both(tiles, visible)]
                else:
                    out = [encoder(tiles).pooled_Bd]
            if grad:
                torch.stack([x.float().sum() for x in out]).sum().backward()
    with torch.no_grad():
        encoder.eval()
        encoder(encoder.stem_features(torch.zeros(6, 3, 32, 32, dtype=torch.uint8)))


@pytest.mark.parametrize("recompute", [False, True])
def test_image_blocks_are_compiled_once_in_each_gradient_mode(encoder: VisionEncoder, recompute: bool):
    encoder.recompute = recompute
    take_steps(encoder)
    # All blocks have the same code, which they share.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale", [False, True], ids=["", "layer scale"])
def test_fused_image_blocks_are_compiled_for_few_arguments(scale: bool, recompute: bool):
    """Two in each gradient mode: for the first block, which adds no branch, and for the others; or for the tokens of each part."""
    torch.compiler.reset()
    counters.clear()
    vit = ["vision.backbone=vit_tiny_patch16_224", "vision.vit.patch_px=8", "vision.vit.depth=2"]
    settings = [*vit, "vision.vit.init_values=0.1"] if scale else SMALL
    built = VisionEncoder(load_config(None, settings).vision, 32)
    built.recompute = recompute
    built.fuse()
    assert built.fused
    for block in built.blocks:
        block.compile(backend="eager")
    take_steps(built)
    found = counters["stats"]["unique_graphs"]
    take_steps(built)
    assert counters["stats"]["unique_graphs"] == found
    assert found == 4
    assert not counters["graph_break"]


def test_without_marks_every_size_is_a_variant(encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch):
    """What the marks are for: PyTorch compiles for one size first."""
    monkeypatch.setattr(recompute, "_mark_sizes", lambda _args: None)
    take_steps(encoder)
    assert counters["stats"]["unique_graphs"] > 2


@pytest.fixture
def one_rank() -> Iterator[None]:
    before = torch._dynamo.config.optimize_ddp
    torch.compiler.reset()
    counters.clear()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.compiler.reset()
    torch._dynamo.config.optimize_ddp = before


def test_blocks_are_compiled_whole_under_ddp(one_rank: None, monkeypatch: pytest.MonkeyPatch):
    """PyTorch would cut the graph of a block after the first MiB of its weights, and compile the parts separately."""
    cut: list[int] = []
    compile_fn = DDPOptimizer.compile_fn

    def recorded(self: DDPOptimizer, graph: GraphModule, *args: Any, **options: Any) -> Any:
        out = compile_fn(self, graph, *args, **options)
        cut.append(len(self.buckets))
        return out

    monkeypatch.setattr(DDPOptimizer, "compile_fn", recorded)
    # Two weights of more than 1 MiB each.
    module = nn.Sequential(nn.Sequential(nn.Linear(520, 520), nn.GELU(), nn.Linear(520, 520)))
    module[0].compile(backend="eager")
    ranks = SimpleNamespace(rank=0, size=2)  # DDP itself is over the one rank of the process group
    engine = TorchEngine(module, load_config(None, ["engine.compile=true", "train.precision=fp32"]), ranks)
    engine.backward(engine.call(lambda trained, x: trained(x).sum(), torch.ones(3, 520)))
    assert counters["stats"]["unique_graphs"] == 1
    assert not cut


def test_a_block_that_is_evaluated_runs_uncompiled():
    calls: list[int] = []
    block = nn.Linear(3, 3)
    block._compiled_call_impl = lambda x: calls.append(1) or x
    x = torch.zeros(2, 3)
    recompute.run_block(block, x, recompute=False)
    assert len(calls) == 1
    assert torch.equal(recompute.run_block(block.eval(), x, recompute=False), block._call_impl(x))
    assert len(calls) == 1


def test_gpu_configs_compile_unless_they_use_deepspeed():
    """No run of DeepSpeed with compiled blocks exists; hooks of ZeRO 3 inside a block would break its graph."""
    configs = {p.stem: load_config(p).engine for p in (ROOT / "configs").glob("*.yaml")}
    assert {n for n, e in configs.items() if e.compile} == {"1gpu", "8xa100", "8xh100", "paper_h100"}
    assert not any(e.compile for e in configs.values() if e.kind == "deepspeed")
