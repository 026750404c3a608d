"""Fused blocks: where they are chosen, and sentences with the values and gradients of plain blocks. Images: ``test_vit_blocks.py``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comtip_kernels.packed_attention import Attention
from torch import Tensor

from comtip_fast.config.io import load_config
from comtip_fast.config.schema import EngineConfig
from comtip_fast.evaluation.trained.encoder import initial_encoder
from comtip_fast.export import Bundle
from comtip_fast.inference import Predictor
from comtip_fast.models import CoMTIP, comtip
from comtip_fast.models.gene_encoder import GeneEncoder
from comtip_fast.training.task import build_task
from tests.comtip_fast.test_models import TEXT, genes


def sentences(encoder: GeneEncoder) -> dict[str, Tensor]:
    out = encoder(genes())
    torch.manual_seed(1)
    (out * torch.randn(out.shape, dtype=out.dtype)).sum().backward()
    return {"output": out.detach()} | {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_sentences_and_gradients_are_those_of_plain_blocks(depth: int, attention: Attention, recompute: bool):
    found = []
    for fuses in (False, True):
        torch.manual_seed(0)
        encoder = GeneEncoder(replace(TEXT, depth=depth), 4, 40, 6, 7).double()
        encoder.set_attention(attention)
        encoder.recompute = recompute
        if fuses:
            encoder.fuse()
        found.append(sentences(encoder))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "kernels", "fuses"),
    [
        ((), True, True),
        ((), False, False),
        (("engine.fused_blocks=false",), True, False),
        (("engine.kind=deepspeed", "engine.zero_stage=2"), True, True),
        (("engine.kind=deepspeed", "engine.zero_stage=3"), True, False),
    ],
    ids=str,
)
def test_blocks_are_fused_where_kernels_run_and_weights_are_whole(
    settings: tuple[str, ...], kernels: bool, fuses: bool, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(comtip, "runs_kernels", lambda device: kernels)
    config = load_config(None, [*tiny_overrides, "vision.target=ema", *settings])
    model = build_task(config, torch.device("cpu")).model
    assert model.teacher is not None
    found = {b.fused for b in (*model.transformer_blocks(), *model.teacher.blocks)}
    assert found == {fuses}


def fused_of(model: CoMTIP) -> bool:
    found = {b.fused for b in model.transformer_blocks()}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("kernels", [True, False])
def test_a_loaded_export_is_fused_on_the_device_that_it_runs_on(
    kernels: bool, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
):
    """Weights are read on the CPU, and then moved."""
    monkeypatch.setattr(comtip, "runs_kernels", lambda device: kernels and device.type == "meta")
    assert not fused_of(Predictor.load(tiny_run).model)
    predictor = Predictor.load(tiny_run, "meta")
    assert fused_of(predictor.model) == kernels


@pytest.mark.parametrize(
    ("engine", "fuses"),
    [(EngineConfig(kind="deepspeed", zero_stage=3), True), (EngineConfig(fused_blocks=False), False)],
    ids=["zero 3", "off"],
)
def test_the_engine_of_training_shards_no_weights_of_an_export(
    engine: EngineConfig, fuses: bool, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(comtip, "runs_kernels", lambda device: True)
    bundle = Bundle.load(tiny_run / "export")
    predictor = Predictor(replace(bundle, config=replace(bundle.config, engine=engine)))
    assert fused_of(predictor.model) == fuses
    assert initial_encoder(predictor, 0).fused == fuses


def test_the_readout_of_an_export_is_fitted_with_fused_blocks(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(comtip, "runs_kernels", lambda device: True)
    task = build_task(load_config(None, tiny_overrides), torch.device("cpu"))
    assert fused_of(task._copy_of_model())
