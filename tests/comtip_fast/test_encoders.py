"""Encoders that users bring: every timm ViT that masking serves, weights from local files, and low-rank adapters."""

from __future__ import annotations

import json
import logging
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from comtip_fast.config.io import ConfigError, load_config
from comtip_fast.config.schema import RunConfig, VisionConfig
from comtip_fast.config.vision import LoraConfig, VitConfig
from comtip_fast.models import CoMTIP, ModelSizes, VisionEncoder
from comtip_fast.models.adapters import merged_state
from comtip_fast.models.pretrained import normalisation
from comtip_fast.plan.sizes import build_on_meta

# One of each kind of timm ViT: class and register tokens, none of them, tokens of distillation, norms before, after and around
# the blocks, parallel blocks, SwiGLU, attention pooling, position embeddings with and without the class token.
KINDS = [
    "test_vit",
    "test_vit2",
    "test_vit3",
    "test_vit4",
    "flexivit_small",
    "deit3_small_patch16_224",
    "deit_base_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch14_reg1_tipsv2",
    "vit_base_patch16_18x2_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_gap_224",
    "vit_base_patch16_radio_v3",
    "vit_base_patch16_reg4_gap_256",
    "vit_base_patch16_rpn_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_xp_224",
    "vit_betwixt_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_giant_patch14_dinov2",
    "vit_giant_patch14_reg4_dinov2",
    "vit_huge_patch16_radio_v4",
    "vit_intern300m_patch14_448",
    "vit_pwee_patch16_reg1_gap_256",
    "vit_so150m_patch16_reg4_gap_256",
    "vit_so150m_patch16_reg4_map_256",
]
# Pathology encoders by their published architectures: (backbone, settings, parameters in millions).
UNI = VitConfig(init_values=1e-5)
UNI2 = VitConfig(
    width=1536, depth=24, heads=24, mlp_ratio=5.33334, mlp="swiglu", init_values=1e-5, registers=8, no_embed_class=True
)
VIRCHOW2 = VitConfig(mlp_ratio=5.3375, mlp="swiglu", init_values=1e-5, registers=4)
TRUE_SHAPES = [
    ("vit_large_patch16_224", UNI, 303),
    ("vit_giant_patch14_224", UNI2, 681),
    ("vit_huge_patch14_224", VIRCHOW2, 631),
    ("vit_giant_patch14_reg4_dinov2", VitConfig(), 1135),
]
TINY = VitConfig(width=32, depth=2, heads=2)
SIZES = ModelSizes(tile_px=64, n_levels=4, vocab_size=40, n_identities=6, longest=18)


def tiles(px: int, n: int = 2) -> Tensor:
    return torch.randint(256, (n, 3, px, px), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def timm_model(name: str, px: int, seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2} | options
    model = timm.create_model(name, img_size=px, num_classes=0, **options).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def features(encoder: VisionEncoder, x: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder.eval()(encoder.stem_features(x)).patches_BVd


# -- architectures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_patches_and_pooled_features_are_those_of_timm(name: str, tmp_path: Path) -> None:
    px = 56 if "patch14" in name else 64
    theirs = timm_model(name, px)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    ours = VisionEncoder(VisionConfig(backbone=name, vit=TINY, pretrained=str(tmp_path / "w.safetensors")), px).eval()
    x = tiles(px)
    with torch.no_grad():
        want = theirs.forward_features((x / 255 - ours.pixel_mean) / ours.pixel_std)[:, theirs.num_prefix_tokens :]
        got = ours(ours.stem_features(x))
        some = torch.arange(want.shape[1] // 2).expand(2, -1)
        masked = ours(ours.stem_features(x), some)
    torch.testing.assert_close(got.patches_BVd, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.pooled_Bd, theirs.fc_norm(want.mean(1)), rtol=1e-5, atol=1e-5)
    assert masked.patches_BVd.shape == (2, some.shape[1], 32)


def test_patches_are_projected_without_a_convolution() -> None:
    """The gradient of a convolution over single patches takes twenty times as long on a CPU as that of the product."""
    encoder = VisionEncoder(VisionConfig(backbone="test_vit", vit=TINY), 64)
    projection = encoder.get_submodule("patch_embed.proj")
    assert isinstance(projection, nn.Conv2d)
    tiles_B3SS = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    patches = encoder.stem_features(tiles_B3SS)
    with torch.profiler.profile() as profile:
        encoder(patches).pooled_Bd.sum().backward()
        embedded = projection(patches.flatten(0, 1))
    assert not [e.key for e in profile.key_averages() if "conv" in e.key]
    copy = nn.Conv2d(3, TINY.width or 0, projection.kernel_size, projection.stride)
    copy.load_state_dict(projection.state_dict())
    images = tiles_B3SS.float()
    torch.testing.assert_close(projection(images), copy(images))
    projection.zero_grad()
    weights = torch.randn(embedded.shape)
    (embedded * weights).sum().backward()
    expected = copy(patches.flatten(0, 1))
    (expected * weights).sum().backward()
    torch.testing.assert_close(embedded, expected)
    torch.testing.assert_close(projection.weight.grad, copy.weight.grad)
    assert projection.bias is not None
    assert copy.bias is not None
    torch.testing.assert_close(projection.bias.grad, copy.bias.grad)


@pytest.mark.parametrize(("name", "vit", "millions"), TRUE_SHAPES)
def test_true_shapes_of_pathology_encoders_build_without_memory(name: str, vit: VitConfig, millions: int) -> None:
    with torch.device("meta"):
        encoder = VisionEncoder(VisionConfig(backbone=name, vit=vit), 224)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=1)
    assert encoder.n_patches == (224 // encoder.patch_px) ** 2


def test_an_architecture_of_timm_is_refused_for_the_small_encoder() -> None:
    with pytest.raises(ConfigError, match=r"vision\.vit: applies to timm backbones"):
        load_config(None, ["vision.vit.depth=2"])


# -- weights from files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pth"])
def test_weights_of_another_tile_size_are_resampled_as_timm_does(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A ViT-S/16 trained on 224 px tiles, on tiles of 128 px."""
    name, file = "vit_small_patch16_224", tmp_path / f"weights{suffix}"
    torch.manual_seed(0)
    state = timm.create_model(name, depth=1).state_dict()  # with its classifier
    save_file(state, file) if suffix == ".safetensors" else torch.save({"state_dict": state}, file)
    theirs = timm.create_model(name, depth=1, img_size=128)
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    with caplog.at_level(logging.INFO, logger="comtip_fast"):
        ours = VisionEncoder(VisionConfig(backbone=name, vit=VitConfig(depth=1), pretrained=str(file)), 128)
    assert torch.equal(ours.pos_embed, theirs.pos_embed)
    assert torch.equal(ours.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])
    report = next(r.getMessage() for r in caplog.records if "tensors loaded" in r.getMessage())
    assert "18 tensors loaded, none missing" in report
    assert "resampled: pos_embed 1x197x384 -> 1x65x384" in report
    assert "not used: 2 head.bias, head.weight" in report


def test_a_checkpoint_like_unis_loads_with_its_own_normalisation(tmp_path: Path) -> None:
    uni = timm_model("vit_large_patch16_224", 224, init_values=1e-5, dynamic_img_size=True)
    torch.save(uni.state_dict(), tmp_path / "pytorch_model.bin")
    facts = {
        "architecture": "vit_large_patch16_224",
        "pretrained_cfg": {"mean": [0.7, 0.6, 0.7], "std": [0.2, 0.3, 0.2]},
    }
    (tmp_path / "config.json").write_text(json.dumps(facts))
    config = VisionConfig(
        backbone="vit_large_patch16_224",
        vit=replace(TINY, init_values=1e-5),
        pretrained=str(tmp_path / "pytorch_model.bin"),
    )
    ours, x = VisionEncoder(config, 224), tiles(224, 1)
    mean, std = torch.tensor([0.7, 0.6, 0.7]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.2]).view(3, 1, 1)
    with torch.no_grad():
        want = uni.forward_features((x / 255 - mean) / std)[:, 1:]
    torch.testing.assert_close(features(ours, x), want, rtol=1e-5, atol=1e-5)
    stated = VisionEncoder(replace(config, pixel_mean=(0.1, 0.2, 0.3)), 224)
    assert stated.pixel_mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert stated.pixel_std.flatten().tolist() == pytest.approx([0.2, 0.3, 0.2])
    # The values travel with the weights, so that exports and checkpoints need no file.
    again = VisionEncoder(replace(config, pretrained=""), 224)
    again.load_state_dict(ours.state_dict())
    torch.testing.assert_close(features(again, x), want, rtol=1e-5, atol=1e-5)


def test_weights_of_earlier_versions_are_normalised_as_imagenet() -> None:
    encoder = VisionEncoder(VisionConfig(backbone="test_vit", vit=TINY, pixel_mean=(0.1, 0.2, 0.3)), 64)
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith("pixel_")}
    encoder.load_state_dict(state)
    assert encoder.pixel_mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code of the file ran",)


def test_files_that_do_not_fit_are_refused_with_the_settings_that_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(file: Path, **vit: object) -> VisionEncoder:
        settings = replace(TINY, **vit)  # type: ignore[arg-type]
        return VisionEncoder(VisionConfig(backbone="vit_tiny_patch16_224", vit=settings, pretrained=str(file)), 64)

    deep = tmp_path / "deep.safetensors"
    save_file(timm_model("vit_tiny_patch16_224", 64, depth=3, init_values=1e-5).state_dict(), deep)
    with pytest.raises(
        ValueError, match=r"also holds blocks\.0\.ls1.*depth=3, width=32, patch_px=16, mlp=mlp.*init_values above 0"
    ):
        load(deep)
    with pytest.raises(ValueError, match=r"lacks blocks\.3"):
        load(deep, depth=4, init_values=1e-5)
    assert load(deep, depth=3, init_values=1e-5).n_patches == 16
    evil = tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load(evil)
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "cut.safetensors").write_bytes(deep.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load(tmp_path / "cut.safetensors")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ValueError, match=r"empty\.pt: cannot be read as weights \(the file ends too early\)"):
        load(tmp_path / "empty.pt")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: not a model description"):
        load(deep, depth=3, init_values=1e-5)


def test_a_normalisation_in_the_config_replaces_an_unusable_one_of_the_model_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"std": [0, 1]}}')
    config = VisionConfig(backbone="vit_tiny_patch16_224", pretrained=str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match=r"std=\[0, 1\] of vit_tiny.* set vision\.pixel_std"):
        normalisation(config)
    assert normalisation(replace(config, pixel_std=(0.1, 0.2, 0.3)))[1] == (0.1, 0.2, 0.3)


# -- adapters ---------------------------------------------------------------------------------------------------


def adapted(rank: int = 2) -> RunConfig:
    vision = VisionConfig(patch_px=16, width=32, depth=2, heads=2, target="ema", lora=LoraConfig(rank=rank))
    return RunConfig(vision=vision)


def test_adapters_alone_are_trained_and_merged_weights_give_the_same_features() -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = CoMTIP(adapted(), SIZES).eval()
    trained = {n for n, p in model.vision.named_parameters() if p.requires_grad}
    assert {n.split(".", 2)[2] for n in trained} == {
        f"attn.{layer}.lora_{side}.default.weight" for layer in ("qkv", "proj") for side in "AB"
    }
    with torch.no_grad():
        for name, p in model.vision.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
    plain = CoMTIP(adapted(rank=0), SIZES)
    merged = merged_state(model)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    x = tiles(64)
    torch.testing.assert_close(features(plain.vision, x), features(model.vision, x), rtol=1e-4, atol=1e-5)
    base = plain.state_dict()["vision.blocks.0.attn.qkv.weight"]
    assert (base - model.state_dict()["vision.blocks.0.attn.qkv.base_layer.weight"]).abs().max() > 1e-3
    on_meta = build_on_meta(adapted(), 64, 6)
    assert {n for n, p in on_meta.vision.named_parameters() if p.requires_grad} == trained


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ValueError, match=r"needs? the library peft, which cannot be imported .*; run pip install 'comtip-fast\[lora\]'"
    ):
        CoMTIP(adapted(), SIZES)
