"""All and visible patches in one pass over the blocks: the features and gradients of two passes, with fewer operators."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from comtip_fast.config.vision import LoraConfig, VisionConfig, VitConfig
from comtip_fast.models import image_encoder, vit_blocks
from comtip_fast.models.image_encoder import VisionEncoder
from comtip_fast.runtime.weight_casts import cast_together, linear_parameters

TINY = VitConfig(width=32, depth=2, heads=2)
SMALL = VisionConfig(backbone="small", patch_px=16, width=32, depth=2, heads=2)
# Class, distillation and register tokens, position embeddings without the class token, norms before the blocks and after
# pooling, layer scale, SwiGLU.
KNOWN = {
    "no prefix": SMALL,
    "class token": VisionConfig(backbone="test_vit", vit=TINY),
    "distillation": VisionConfig(backbone="deit_base_distilled_patch16_224", vit=TINY),
    "registers, no class token": VisionConfig(backbone="vit_base_patch16_reg4_gap_256", vit=TINY),
    "norm before": VisionConfig(backbone="vit_base_patch16_clip_224", vit=TINY),
    "layer scale": VisionConfig(backbone="deit3_small_patch16_224", vit=TINY),
    "swiglu": VisionConfig(
        backbone="vit_tiny_patch16_224",
        vit=VitConfig(
            width=32,
            depth=2,
            heads=2,
            mlp="swiglu",
            init_values=1e-2,
            registers=2,
            class_token=True,
            no_embed_class=True,
        ),
    ),
    "adapters": VisionConfig(backbone="vit_tiny_patch16_224", vit=TINY, lora=LoraConfig(rank=2)),
}
UNKNOWN = {
    "parallel": VisionConfig(backbone="vit_base_patch16_18x2_224", vit=TINY),
    "norms after": VisionConfig(backbone="vit_base_patch16_rpn_224", vit=TINY),
    "one product": VisionConfig(backbone="vit_base_patch16_xp_224", vit=TINY),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "qk norm": {"qk_norm": True},
    "norm after attention": {"scale_attn_norm": True},
    "norm in the MLP": {"scale_mlp_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
}


def built(config: VisionConfig) -> VisionEncoder:
    torch.manual_seed(0)
    if config.lora.rank:
        pytest.importorskip("peft")
    encoder = VisionEncoder(config, 64).double().train()
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.1)
    return encoder


def inputs(encoder: VisionEncoder) -> tuple[Tensor, Tensor]:
    features = torch.randn(3, encoder.n_patches, 3, encoder.patch_px, encoder.patch_px, dtype=torch.float64)
    order = torch.stack([torch.randperm(encoder.n_patches) for _ in range(3)])
    return features, order[:, : encoder.n_patches // 3].sort(dim=1).values


def results(encoder: VisionEncoder, features: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """Return the outputs of both branches and the gradients of all trained parameters."""
    encoder.zero_grad()
    outputs = [x for tokens in encoder.encode_both(features, visible) for x in tokens]
    torch.manual_seed(1)
    torch.stack([(x * torch.randn_like(x)).sum() for x in outputs]).sum().backward()
    gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    return {f"output {i}": x.detach() for i, x in enumerate(outputs)} | gradients


def check_equal(encoder: VisionEncoder) -> None:
    features, visible = inputs(encoder)
    calls: list[int] = []
    encoder.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    found = results(encoder, features, visible)
    assert len(calls) == 1
    encoder.takes_parts = False
    expected = results(encoder, features, visible)
    assert len(calls) == 3
    assert found.keys() == expected.keys()
    assert len(expected) > 4
    for name, want in expected.items():
        # The gradient of the bias of a norm of keys is 0 but for rounding.
        assert (found[name] - want).abs().max() <= 1e-12 * want.abs().max() + 1e-15, name


@pytest.mark.parametrize("kind", KNOWN)
def test_features_and_gradients_are_those_of_two_passes(kind: str):
    encoder = built(KNOWN[kind])
    assert encoder.takes_parts
    check_equal(encoder)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_blocks(option: str, monkeypatch: pytest.MonkeyPatch):
    create: Callable[..., nn.Module] = image_encoder.timm.create_model
    monkeypatch.setattr(image_encoder.timm, "create_model", lambda *a, **k: create(*a, **k, **OPTIONS[option]))
    encoder = built(VisionConfig(backbone="vit_tiny_patch16_224", vit=TINY))
    assert encoder.takes_parts
    check_equal(encoder)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_blocks_of_other_kinds_run_twice(kind: str):
    encoder = built(UNKNOWN[kind])
    assert not encoder.takes_parts
    features, visible = inputs(encoder)
    both, calls = results(encoder, features, visible), []
    encoder.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    encoder.encode_both(features, visible)
    assert len(calls) == 2
    torch.testing.assert_close(both["output 0"], encoder(features).patches_BVd, rtol=0, atol=0)
    torch.testing.assert_close(both["output 2"], encoder(features, visible).patches_BVd, rtol=0, atol=0)


def test_parts_do_not_see_each_other():
    encoder = built(SMALL)
    features, visible = inputs(encoder)
    full, seen = encoder.encode_both(features, visible)
    hidden = torch.ones(3, encoder.n_patches, dtype=torch.bool).scatter(1, visible, False)
    changed = torch.where(hidden[..., None, None, None], features + 1, features)
    full_changed, seen_changed = encoder.encode_both(changed, visible)
    torch.testing.assert_close(seen_changed.patches_BVd, seen.patches_BVd, rtol=0, atol=1e-12)
    assert (full_changed.pooled_Bd - full.pooled_Bd).abs().max() > 1e-3


def test_activation_checkpointing_runs_the_branches_one_after_the_other():
    encoder = built(SMALL)
    features, visible = inputs(encoder)
    expected = results(encoder, features, visible)
    encoder.recompute, calls = True, []
    encoder.blocks[0].register_forward_hook(lambda _m, args, _o: calls.append(args[0].shape[1]))
    found = results(encoder, features, visible)
    assert set(calls) == {encoder.n_patches, visible.shape[1]}
    for name, want in expected.items():
        assert (found[name] - want).abs().max() <= 1e-12 * want.abs().max(), name


class Operators(TorchDispatchMode):
    """Counts operators, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_block_has_fewer_operators_and_one_gradient_per_weight():
    def operators(depth: int, one_pass: bool) -> Counter[str]:
        encoder = built(VisionConfig(backbone="small", patch_px=16, width=32, depth=depth, heads=2))
        encoder.takes_parts = one_pass
        with Operators() as mode:
            results(encoder, *inputs(encoder))
        return mode.counts

    def per_block(one_pass: bool) -> Counter[str]:
        more = operators(3, one_pass)
        more.subtract(operators(2, one_pass))
        return more

    one, two = per_block(True), per_block(False)
    # The projection after attention runs for each part, the other three products run once.
    assert one["addmm"] == 5
    assert two["addmm"] == 8
    assert one["add"] + one["add_"] <= two["add"] + two["add_"] - 10
    assert one.total() <= 0.72 * two.total()


def test_one_unknown_part_makes_a_block_unknown():
    def block(**options: Any) -> Block:
        return Block(8, 2, **options)

    assert vit_blocks.take_parts([block()])
    dropped, fused, further, norm = block(), block(), block(), block()
    dropped.attn.proj_drop.p = 0.1
    fused.attn.fused_attn = False
    further.attn.add_module("rotary", nn.Identity())
    norm.norm1 = nn.BatchNorm1d(8)
    for unknown in (dropped, fused, further, norm, block(drop_path=0.1)):
        known = block()
        assert not vit_blocks.take_parts([known, unknown])
        assert type(known) is Block
        assert type(known.attn) is Attention


def test_a_newer_timm_runs_two_passes(monkeypatch: pytest.MonkeyPatch):
    assert vit_blocks.release(timm.__version__) <= vit_blocks.TESTED, "test with this release, then raise TESTED"
    newest = vit_blocks.TESTED
    monkeypatch.setattr(vit_blocks.timm, "__version__", ".".join(map(str, (*newest[:-1], newest[-1] + 1))))
    assert not vit_blocks.take_parts([Block(8, 2)])
    assert vit_blocks.release("1.0.31.dev0") == (1, 0, 31)


def test_names_of_parameters_are_those_of_timm():
    names = set(timm.create_model("test_vit", num_classes=0, img_size=64, depth=2).blocks.state_dict())
    assert set(built(KNOWN["class token"]).blocks.state_dict()) == names


def test_a_block_has_the_options_of_timm():
    torch.manual_seed(0)
    block, x = Block(8, 2), torch.randn(2, 5, 8)
    mask = (torch.arange(5) < 3)[None, None, None]
    expected = block(x, attn_mask=mask)
    assert vit_blocks.take_parts([block])
    torch.testing.assert_close(block(x, attn_mask=mask), expected, rtol=0, atol=0)
    assert not torch.equal(block(x), expected)


# -- fused blocks ------------------------------------------------------------------------------------------------

FUSED = {"no prefix", "class token", "distillation", "registers, no class token", "norm before", "layer scale"}
"""Encoders of ``KNOWN`` whose blocks can be fused: SwiGLU and adapters do not allow it."""


def fused_copy(encoder: VisionEncoder) -> VisionEncoder:
    other = copy.deepcopy(encoder)
    other.fuse()
    return other


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KNOWN)
def test_features_and_gradients_of_images_are_those_of_plain_blocks(kind: str, recompute: bool):
    plain = built(KNOWN[kind])
    other = fused_copy(plain)
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
    assert not fused_copy(built(KNOWN["class token"])).fused


def test_one_block_that_cannot_be_fused_leaves_all_as_they_are():
    encoder = built(SMALL)
    encoder.blocks[1].mlp.act = nn.GELU(approximate="tanh")
    encoder.fuse()
    assert not any(block.fused for block in encoder.blocks)


def bf16_results(encoder: VisionEncoder, features: Tensor, visible: Tensor, together: bool) -> dict[str, Tensor]:
    encoder.zero_grad()
    groups = [linear_parameters(block) for block in encoder.blocks] if together else []
    with torch.autocast("cpu", torch.bfloat16), cast_together(groups):
        outputs = [x for tokens in encoder.encode_both(features, visible) for x in tokens]
        torch.manual_seed(1)
        torch.stack([(x * torch.randn(x.shape, dtype=torch.float64)).sum() for x in outputs]).sum().backward()
    gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    return {f"output {i}": x.detach() for i, x in enumerate(outputs)} | gradients


@pytest.mark.parametrize("config", [replace(SMALL, depth=3), KNOWN["layer scale"]], ids=["plain", "layer scale"])
@pytest.mark.parametrize("together", [False, True])
def test_bf16_differs_from_plain_blocks_by_rounding(config: VisionConfig, together: bool):
    """Relative to fp64, errors of outputs and gradients are at most slightly larger than those of plain blocks."""
    exact = built(config)
    features, visible = inputs(exact)
    want = results(exact, features, visible)
    plain = copy.deepcopy(exact).float()
    errors = []
    for encoder in (plain, fused_copy(plain)):
        found = bf16_results(encoder, features.float(), visible, together)
        assert found.keys() == want.keys()
        assert all(x.dtype == torch.float32 for name, x in found.items() if not name.startswith("output"))
        errors.append({n: float((x - want[n]).norm() / want[n].norm()) for n, x in found.items()})
    assert max(errors[0].values()) > 1e-3  # bf16 ran
    for name, error in errors[0].items():
        assert errors[1][name] < 1.5 * error + 2e-3, name


def test_biases_that_are_added_in_fp32_are_not_cast():
    encoder = fused_copy(built(SMALL).float())
    names = {id(p): n for n, p in encoder.named_parameters()}
    cast = {names[id(getattr(layer, n))] for layer, n in linear_parameters(encoder.blocks[0])}
    assert cast == {
        f"blocks.0.{n}" for n in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    }


def test_checkpointing_stores_one_tensor_per_block():
    """A fused block takes a stream and a branch; with activation checkpointing, both would be stored."""
    encoder = fused_copy(built(replace(SMALL, depth=3)))
    encoder.recompute = True
    given: list[int] = []
    for block in encoder.blocks:
        block.register_forward_pre_hook(lambda _m, args: given.append(sum(isinstance(x, Tensor) for x in args)))
    encoder(inputs(encoder)[0])
    assert given == [1, 1, 1]
    encoder.recompute = False
    encoder(inputs(encoder)[0])
    assert given[3:] == [1, 3, 3]
