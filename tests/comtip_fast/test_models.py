"""The model: the table equals encoding each sentence, hidden patches are never computed, outputs equal timm's."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from comtip_fast.config.schema import AlignConfig, RunConfig, TextConfig, VisionConfig
from comtip_fast.config.vision import VitConfig
from comtip_fast.genes.tokens import GeneTokens
from comtip_fast.models import CoMTIP, GeneEncoder, MaskFeatureGenerator, ModelSizes, VisionEncoder

TEXT = TextConfig(width=16, depth=2, heads=2, max_tokens=5)
VISION = VisionConfig(patch_px=8, width=16, depth=2, heads=2)
SIZES = ModelSizes(tile_px=32, n_levels=4, vocab_size=40, n_identities=6, longest=7)


def genes(n: int = 6, seed: int = 0) -> GeneTokens:
    rng = np.random.default_rng(seed)
    length = torch.from_numpy(rng.integers(3, 8, n))
    ids = torch.from_numpy(rng.integers(3, 40, (n, 7)))
    ids[:, 0] = 1
    ids[torch.arange(7) >= length[:, None]] = 0
    return GeneTokens(ids, length, torch.arange(1, n + 1) % 7)


def encoder() -> GeneEncoder:
    torch.manual_seed(0)
    return GeneEncoder(TEXT, 4, 40, 6, 7).double()


def test_heads_that_do_not_divide_the_width_of_a_backbone_are_refused():
    with pytest.raises(ValueError, match=r"vision\.heads=3: does not divide the width of the image encoder \(16\)"):
        MaskFeatureGenerator(16, 3, 4)


def model(**vision: object) -> CoMTIP:
    torch.manual_seed(0)
    return CoMTIP(RunConfig(vision=replace(VISION, **vision), text=TEXT, align=AlignConfig(dim=12)), SIZES)


# -- sentences --------------------------------------------------------------------------------------------------


def test_the_table_equals_encoding_each_sentence_of_each_spot():
    enc, panel = encoder(), genes()
    levels = torch.randint(4, (5, 6), generator=torch.Generator().manual_seed(1))
    weight = torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    table = enc(panel)
    in_parts = torch.cat([enc(panel, slice(0, 7)), enc(panel, slice(7, 24))])  # the slices split a gene
    torch.testing.assert_close(in_parts, table, rtol=1e-12, atol=1e-12)
    from_table = table.view(6, 4, 16)[torch.arange(6), levels]
    (from_table * weight).sum().backward()
    grads = {n: p.grad.clone() for n, p in enc.named_parameters()}
    enc.zero_grad()
    one_by_one = torch.stack(
        [
            torch.cat(
                [
                    enc.encode(
                        GeneTokens(
                            panel.ids_GT[g : g + 1, : panel.length_G[g]],
                            panel.length_G[g : g + 1],
                            panel.identity_G[g : g + 1],
                        ),
                        levels[b, g : g + 1],
                    )
                    for g in range(6)
                ]
            )
            for b in range(5)
        ]
    )
    torch.testing.assert_close(one_by_one, from_table, rtol=1e-10, atol=1e-10)
    (one_by_one * weight).sum().backward()
    for name, parameter in enc.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-9, atol=1e-10)


def test_equal_tokens_are_projected_once_in_the_first_block():
    """A gene vector makes tokens unequal, so that vectors of zeros give the values without sharing."""
    panel, enc = genes(), encoder()
    torch.manual_seed(0)
    unshared = GeneEncoder(TEXT, 4, 40, 6, 7, vector_dim=3).double()
    unshared.load_state_dict(enc.state_dict(), strict=False)
    with_zeros = replace(panel, vector_GK=torch.zeros(6, 3, dtype=torch.float64))
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found, rows = [], []
    for each, tokens in ((enc, panel), (unshared, with_zeros)):
        each.blocks[0].qkv.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
        out = each(tokens)
        (out * weight).sum().backward()
        found.append((out, {n: p.grad for n, p in each.named_parameters() if n != "project_vector.weight"}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-12)
    S = 4 * int(panel.length_G.sum())
    distinct = {
        (int(t), i) for ids, n in zip(panel.ids_GT, panel.length_G, strict=True) for i, t in enumerate(ids[1 : n - 1])
    }
    values = 4 * len(set(panel.length_G.tolist()))
    assert rows == [6 + len(distinct) + values, S]


@pytest.mark.parametrize("depth", [1, 2])
def test_the_last_block_computes_keys_and_values_of_no_token(depth: int):
    """Values and gradients are those of attention for all tokens, which ``text.attention=sdpa`` computes in every block."""
    panel, found, projected = genes(), [], []
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for attention in ("auto", "sdpa"):
        torch.manual_seed(0)
        enc = GeneEncoder(replace(TEXT, depth=depth), 4, 40, 6, 7).double()
        enc.set_attention(attention)
        enc.blocks[-1].qkv.register_forward_hook(lambda module, inputs, output: projected.append(tuple(output.shape)))
        out = enc(panel)
        (out * weight).sum().backward()
        found.append((out, {n: p.grad for n, p in enc.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)
    assert projected[0] == (24, 16)  # one row per sentence, of the width of the values
    assert projected[1][1] == 3 * 16


def test_recomputation_keeps_the_distinct_rows_of_the_first_block_only():
    panel, widest, grads = genes(), [], []
    for recompute in (False, True):
        enc, sizes = encoder(), []
        enc.recompute = recompute

        def keep(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.untyped_storage().nbytes())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = enc(panel)
        out.square().sum().backward()
        widest.append(max(sizes))
        grads.append({n: p.grad for n, p in enc.named_parameters()})
    tokens = (
        4 * int(panel.length_G.sum()) * 16 * 8
    )  # bytes of the stream; q, k and v of all tokens are three times as many
    assert widest == [4 * tokens, tokens]  # the hidden layer of an MLP; the input of the second block
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


def test_a_sentence_depends_on_its_own_tokens_only():
    enc, panel = encoder(), genes()
    before = enc(panel).view(6, 4, 16)
    changed = GeneTokens(panel.ids_GT.clone(), panel.length_G, panel.identity_G)
    changed.ids_GT[2, 1] = (changed.ids_GT[2, 1] + 1) % 37 + 3
    changed.ids_GT[4, panel.length_G[4] :] = 9  # padding
    after = enc(changed).view(6, 4, 16)
    others = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=1e-14)
    assert (after[2] - before[2]).abs().max() > 1e-3


def test_level_interpolation_equals_the_levels_at_both_ends():
    enc, panel = encoder(), genes(2)
    lo, hi = torch.tensor([1, 2]), torch.tensor([2, 3])
    ends = [enc.encode(panel, lo, hi, torch.tensor([m, m], dtype=torch.float64)) for m in (0.0, 1.0)]
    torch.testing.assert_close(ends[0], enc.encode(panel, lo))
    torch.testing.assert_close(ends[1], enc.encode(panel, hi))


def test_identity_row_0_is_not_used():
    enc, panel = encoder(), genes()
    unknown = GeneTokens(panel.ids_GT, panel.length_G, panel.identity_G * 0)
    before = enc(unknown)
    with torch.no_grad():
        enc.identity_Id[0] += 5.0
    torch.testing.assert_close(enc(unknown), before, rtol=0, atol=0)


# -- patches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "hidden"), [(0.5, 8), (0.25, 4), (0.9, 14)])
def test_hidden_patches_are_never_computed(ratio: int, hidden: int):
    net = model(mask_ratio=ratio)
    entered: list[int] = []
    attended: list[int] = []
    net.vision.patch_embed.register_forward_hook(lambda _m, args, _o: entered.append(args[0].shape[0]))
    net.vision.blocks[0].register_forward_hook(lambda _m, args, _o: attended.append(args[0].shape[1]))
    tiles = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    patches = net.vision.stem_features(tiles)
    # Hidden patches are NaN: any use of them would propagate.
    rows = torch.arange(3)[:, None]
    patches[rows, order[:, :hidden]] = float("nan")
    seen = net.vision(patches, order[:, hidden:])
    assert entered == [3 * (16 - hidden)]
    assert attended == [16 - hidden]
    assert seen.patches_BVd.isfinite().all()
    assert net.generator(seen.patches_BVd, order[:, :hidden]).isfinite().all()


def test_predictions_depend_on_the_hidden_position_and_the_visible_patches():
    net = model()
    visible = torch.randn(2, 8, 16)
    a = net.generator(visible, torch.tensor([[3, 7], [1, 2]]))
    b = net.generator(visible, torch.tensor([[7, 3], [2, 1]]))
    torch.testing.assert_close(a, b.flip(1))
    assert (net.generator(visible * 0, torch.tensor([[3, 7], [1, 2]])) - a).abs().max() > 1e-4


@pytest.mark.parametrize(("name", "patches"), [("vit_base_patch32_224", 49), ("vit_tiny_patch16_224", 196)])
def test_timm_backbones_return_the_features_of_timm(name: str, patches: int, tmp_path: Path):
    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    ours = VisionEncoder(VisionConfig(backbone=name, pretrained=str(tmp_path / "weights.safetensors")), 224).eval()
    tiles = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    normal = (tiles / 255 - ours.pixel_mean) / ours.pixel_std
    with torch.no_grad():
        want = theirs.forward_features(normal)[:, 1:]
        got = ours(ours.stem_features(tiles))
    assert got.patches_BVd.shape == (1, patches, want.shape[-1])
    torch.testing.assert_close(got.patches_BVd, want, rtol=1e-4, atol=1e-4)
    assert int(0.5 * patches) == {49: 24, 196: 98}[patches]


def test_invalid_backbones_and_weights_are_reported(tmp_path: Path):
    with pytest.raises(ValueError, match=r"timm cannot build it.*; choose a name of timm\.list_models"):
        VisionEncoder(VisionConfig(backbone="vit_enormous"), 224)
    with pytest.raises(ValueError, match=r"timm cannot build it.*; correct vision\.vit, or choose a name"):
        VisionEncoder(VisionConfig(backbone="vit_tiny_patch16_224", vit=VitConfig(heads=7)), 224)
    with pytest.raises(ValueError, match="not a Vision Transformer"):
        VisionEncoder(VisionConfig(backbone="swin_tiny_patch4_window7_224"), 224)
    with pytest.raises(ValueError, match=r"weights\.pth: no such file; give a file of weights"):
        VisionEncoder(VisionConfig(backbone="vit_tiny_patch16_224", pretrained="weights.pth"), 224)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"do not fit vision\.backbone"):
        VisionEncoder(VisionConfig(backbone="vit_tiny_patch16_224", pretrained=str(tmp_path / "x.safetensors")), 224)
    with pytest.raises(ValueError, match="tiles are 48 px wide"):
        VisionEncoder(VISION, 32).stem_features(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))


def test_the_frozen_stem_does_not_use_tf32():
    from comtip_fast.models.stems import EfficientNetLite0Stem

    conv = torch.backends.cudnn.conv
    assert conv.fp32_precision != "ieee"  # PyTorch's default, which users keep for their own models
    stem, used = EfficientNetLite0Stem(), []
    stem.blocks[0].register_forward_hook(lambda *_: used.append(conv.fp32_precision))
    stem.stages(torch.zeros(1, 3, 32, 32))
    assert used == ["ieee"]
    assert conv.fp32_precision != "ieee"


def test_the_frozen_stem_folds_batch_norms_and_ignores_the_batch():
    from comtip_fast.models.stems import EfficientNetLite0Stem

    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    stem = EfficientNetLite0Stem()
    stem.load_pretrained()
    x = torch.randn(4, 3, 32, 32)
    raw = stem.raw(x)
    assert raw.shape == (4, 432)
    # The features of a patch do not depend on the rest of the batch.
    torch.testing.assert_close(stem.raw(x[1:2]), raw[1:2], rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in stem.parameters())
    assert not stem.train().training
    # The loader computes the features of training tiles outside of autocast, and predictions compute them under it.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(stem.raw(x), raw)
    del net


def test_the_frozen_stem_processes_a_bounded_number_of_patches_at_once_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    from comtip_fast.models import stems

    torch.manual_seed(0)
    stem, seen = stems.EfficientNetLite0Stem(), []
    x = torch.randn(7, 3, 32, 32)
    whole = stem.stages(x)
    stem.conv_stem.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    monkeypatch.setattr(stems, "CPU_CHUNK", 3)
    torch.testing.assert_close(stem.stages(x), whole, rtol=1e-4, atol=1e-4)
    assert seen == [3, 3, 1]
    assert stem.stages(x[:0]).shape == (0, whole.shape[1])


def test_the_encoder_embeds_the_chosen_stages_of_the_stem():
    config = VisionConfig(stem="efficientnet_lite0", stem_stages=(7, 1), patch_px=16, width=16, depth=1, heads=2)
    encoder = VisionEncoder(config, 32)
    assert encoder.patch_embed.in_features == encoder.stem.width == 16 + 320
    tiles = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoded, stages = encoder.stem_stages(tiles)
    torch.testing.assert_close(encoded, torch.cat([stages[..., :16], stages[..., -320:]], dim=-1))
    torch.testing.assert_close(encoder.stem_features(tiles), encoded)


# -- CoMTIP -----------------------------------------------------------------------------------------------------


def step(net: CoMTIP):
    tiles = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    return net(net.vision.stem_features(tiles), order[:, 8:], order[:, :8], genes())


def test_temperature_is_clamped_in_the_forward_and_never_in_place():
    net = model()
    with torch.no_grad():
        net.log_scale_nce.fill_(50.0)
    assert float(step(net).scale_nce.detach()) == pytest.approx(100.0)
    assert float(net.log_scale_nce.detach()) == 50.0


def test_targets_are_detached_and_come_from_the_full_branch():
    out = step(model())
    assert not out.target_BKd.requires_grad
    assert out.predicted_BKd.requires_grad
    assert out.predicted_BKd.shape == out.target_BKd.shape == (3, 8, 16)
    torch.testing.assert_close(out.image.vector_BD.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(out.table.unit_GQD.norm(dim=-1), torch.ones(6, 4))


def test_the_teacher_is_a_moving_average():
    net = model(target="ema")
    start = copy.deepcopy(net.teacher.state_dict())
    with torch.no_grad():
        for parameter in net.vision.parameters():
            parameter.add_(1.0)
    net.update_teacher(0.75)
    for name, slow in net.teacher.named_parameters():
        torch.testing.assert_close(slow, start[name] + 0.25)
    assert not any(p.requires_grad for p in net.teacher.parameters())
    assert step(net).target_BKd is not None


def test_gradients_are_bitwise_reproducible():
    grads = []
    for _ in range(2):
        net = model()
        out = step(net)
        (out.image.vector_BD.sum() + out.table.rows_GQD.square().sum() + out.predicted_BKd.square().sum()).backward()
        grads.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])
