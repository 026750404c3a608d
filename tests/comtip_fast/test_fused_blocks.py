"""Fused blocks: the values, gradients and stored tensors of plain blocks, for the blocks that allow it and where kernels run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from comtip_kernels.packed_attention import Attention
from test_models import TEXT, genes
from test_vit_blocks import KNOWN, OPTIONS, SMALL, built, inputs, results
from torch import Tensor, nn

from comtip_fast.config.io import load_config
from comtip_fast.models import comtip, image_encoder
from comtip_fast.models.gene_encoder import GeneEncoder
from comtip_fast.models.image_encoder import VisionEncoder
from comtip_fast.runtime.weight_casts import cast_together, linear_parameters
from comtip_fast.training.task import build_task

FUSED = {"no prefix", "class token", "distillation", "registers, no class token", "norm before"}
"""Encoders of ``KNOWN`` whose blocks allow it: layer scales, SwiGLU and adapters do not."""


def fused(encoder: VisionEncoder) -> VisionEncoder:
    other = copy.deepcopy(encoder)
    other.fuse()
    return other


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KNOWN)
def test_features_and_gradients_of_images_are_those_of_plain_blocks(kind: str, recompute: bool):
    plain = built(KNOWN[kind])
    other = fused(plain)
    assert other.fused == (kind in FUSED)
    features, visible = inputs(plain)
    plain.recompute = other.recompute = recompute
    expected, found = results(plain, features, visible), results(other, features, visible)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert (found[name] - want).abs().max() <= 1e-11 * want.abs().max() + 1e-15, name


@pytest.mark.parametrize("option", OPTIONS)
def test_blocks_with_other_layers_are_not_fused(option: str, monkeypatch: pytest.MonkeyPatch):
    create: Callable[..., nn.Module] = image_encoder.timm.create_model
    monkeypatch.setattr(image_encoder.timm, "create_model", lambda *a, **k: create(*a, **k, **OPTIONS[option]))
    assert not fused(built(KNOWN["class token"])).fused


def test_one_block_that_cannot_be_fused_leaves_all_as_they_are():
    encoder = built(SMALL)
    encoder.blocks[1].mlp.act = nn.GELU(approximate="tanh")
    encoder.fuse()
    assert not any(block.fused for block in encoder.blocks)


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


def bf16_results(encoder: VisionEncoder, features: Tensor, visible: Tensor, together: bool) -> dict[str, Tensor]:
    encoder.zero_grad()
    groups = [linear_parameters(block) for block in encoder.blocks] if together else []
    with torch.autocast("cpu", torch.bfloat16), cast_together(groups):
        outputs = [x for tokens in encoder.encode_both(features, visible) for x in tokens]
        torch.manual_seed(1)
        torch.stack([(x * torch.randn(x.shape, dtype=torch.float64)).sum() for x in outputs]).sum().backward()
    gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    return {f"output {i}": x.detach() for i, x in enumerate(outputs)} | gradients


@pytest.mark.parametrize("together", [False, True])
def test_bf16_differs_from_plain_blocks_by_rounding(together: bool):
    """Relative to fp64, errors of outputs and gradients are at most slightly larger than those of plain blocks."""
    exact = built(replace(SMALL, depth=3))
    features, visible = inputs(exact)
    want = results(exact, features, visible)
    plain = copy.deepcopy(exact).float()
    errors = []
    for encoder in (plain, fused(plain)):
        found = bf16_results(encoder, features.float(), visible, together)
        assert found.keys() == want.keys()
        assert all(x.dtype == torch.float32 for name, x in found.items() if not name.startswith("output"))
        errors.append({n: float((x - want[n]).norm() / want[n].norm()) for n, x in found.items()})
    assert max(errors[0].values()) > 1e-3  # bf16 ran
    for name, error in errors[0].items():
        assert errors[1][name] < 1.5 * error + 2e-3, name


def test_biases_that_are_added_in_fp32_are_not_cast():
    encoder = fused(built(SMALL).float())
    names = {id(p): n for n, p in encoder.named_parameters()}
    cast = {names[id(getattr(layer, n))] for layer, n in linear_parameters(encoder.blocks[0])}
    assert cast == {f"blocks.0.{n}" for n in ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight")} | {
        f"blocks.0.mlp.{n}.weight" for n in ("fc1", "fc2")
    }


def test_checkpointing_stores_one_tensor_per_block():
    """A fused block takes a stream and a branch; with activation checkpointing, both would be stored."""
    encoder = fused(built(replace(SMALL, depth=3)))
    encoder.recompute = True
    given: list[int] = []
    for block in encoder.blocks:
        block.register_forward_pre_hook(lambda _m, args: given.append(sum(isinstance(x, Tensor) for x in args)))
    encoder(inputs(encoder)[0])
    assert given == [1, 1, 1]
    encoder.recompute = False
    encoder(inputs(encoder)[0])
    assert given[3:] == [1, 3, 3]


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
