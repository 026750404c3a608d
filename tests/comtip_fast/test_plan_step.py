"""FLOPs and activations of the plan against a real CPU step, and its parameters against the real model."""

from dataclasses import replace
from typing import Any

import comtip_kernels as kernels
import pytest
import torch
from comtip_kernels import flops
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from comtip_fast.config.io import load_config
from comtip_fast.models import CoMTIP
from comtip_fast.plan.cost import AUTOCAST, FP32, total
from comtip_fast.plan.engine import EngineSpec
from comtip_fast.plan.loss_parts import infonce, level, pair, pooling
from comtip_fast.plan.memory import step_rows
from comtip_fast.plan.parts import text_attention
from comtip_fast.plan.rank_share import RankShare
from comtip_fast.plan.sizes import Inputs, Sizes, build_on_meta, sizes_of
from tests.comtip_fast.plan_measure import MORE_FORMULAS, Measured, measure, measure_peak

VIT = ["vision.patch_px=8", "vision.width=96", "vision.depth=3", "text.width=64", "text.depth=2"]
SHAPES = {
    "vision dominates": VIT,
    "sentences dominate": ["text.width=96", "text.depth=3", "align.dim=64", "levels.n_levels=12"],
    "no masked branch": [*VIT, "loss.mfm=0"],
    "many patches": ["vision.patch_px=4", "vision.width=32", "vision.depth=4"],
    "EMA teacher": [*VIT, "vision.target=ema"],
    "no pairs": [*VIT, "loss.pair=0", "loss.paat.hard_columns=false"],
    "text as pair context": ["loss.paat.context=text", "align.dim=128"],
    "levels only": ["loss.nce=0", "loss.mfm=0", "loss.pair=0", "align.dim=192", "levels.n_levels=16"],
    "activation checkpointing": [*VIT, "engine.activation_checkpointing=true"],
    "prefix tokens, layer scale": ["vision.backbone=vit_wee_patch16_reg1_gap_256"],
}


@pytest.fixture(scope="module", params=SHAPES)
def step(request: pytest.FixtureRequest, tiny_overrides: list[str]) -> Measured:
    return measure([*tiny_overrides, *SHAPES[request.param]])


def test_flops_of_a_step(step: Measured):
    assert step.predicted("flops") == pytest.approx(step.forward_flops, rel=0.02)
    both = step.predicted("flops") + step.predicted("back_flops")
    assert both == pytest.approx(step.all_flops, rel=0.02)


def test_bytes_saved_for_the_backward_pass(step: Measured):
    s, w = step.sizes, step.share
    batch = w.spots * s.P * s.patch_inputs * 4
    assert step.predicted_saved + batch == pytest.approx(step.saved_bytes, rel=0.04)


def test_bytes_saved_under_autocast(tiny_overrides: list[str]):
    step = measure([*tiny_overrides, *VIT], bf16=True)
    copies = 2 * step.sizes.matrices
    assert step.predicted_saved + copies == pytest.approx(step.saved_bytes, rel=0.05)
    full = measure([*tiny_overrides, *VIT])
    assert step.saved_bytes < 0.75 * full.saved_bytes


@pytest.mark.parametrize("more", [[], ["engine.activation_checkpointing=true"], ["engine.micro_batches=4"]], ids=str)
def test_the_peak_memory_of_a_step(more: list[str], tiny_overrides: list[str]):
    wide = [
        "vision.patch_px=4",
        "vision.width=128",
        "vision.depth=4",
        "text.width=128",
        "text.depth=3",
        "align.dim=128",
    ]
    measured, plan = measure_peak([*tiny_overrides, *wide, *more, "data.workers=0"])
    prefetched = sum(r.bytes for r in plan.memory if r.name.startswith("loader"))
    assert plan.device_bytes - prefetched == pytest.approx(measured, rel=0.10)


def test_parameter_counts_equal_those_of_the_model(tiny_overrides: list[str]):
    config = load_config(None, [*tiny_overrides, "vision.target=ema", "vision.stem=efficientnet_lite0"])
    meta = build_on_meta(config, 32, 30)
    assert {p.device.type for p in [*meta.parameters(), *meta.buffers()]} == {"meta"}
    sizes = sizes_of(config, Inputs(tile_px=32, trained_genes=30))
    from comtip_fast.genes import GeneTokenizer
    from comtip_fast.models import ModelSizes

    real = CoMTIP(
        config,
        ModelSizes(tile_px=32, n_levels=5, vocab_size=GeneTokenizer.load().vocab_size, n_identities=30, longest=8),
    )
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in real.parameters() if not p.requires_grad) + sum(b.numel() for b in real.buffers())
    assert (sizes.trained, sizes.frozen) == (trained, frozen)


def test_an_unknown_block_is_rejected(tiny_overrides: list[str]):
    config = load_config(None, [*tiny_overrides, "vision.backbone=vit_giant_patch14_reg4_dinov2"])
    with pytest.raises(ValueError, match="blocks"):
        sizes_of(config, Inputs(tile_px=56, trained_genes=30))


def test_a_large_model_is_built_without_memory():
    config = load_config(None, ["vision.backbone=vit_giant_patch14_224"])
    model = build_on_meta(config, 224, 1000)
    assert sum(p.numel() for p in model.parameters()) > 1e9
    assert all(p.is_meta for p in model.parameters())
    assert torch.get_default_device().type == "cpu"


SMALL = {"B": 48, "M": 80, "G": 6, "Q": 4, "D": 32}


def loss_parts(sizes: Sizes, *, gpu: bool) -> dict[str, tuple[float, float]]:
    """Return the forward and backward FLOPs of the losses over spots and sentences, for the sizes in ``SMALL``."""
    sizes = replace(sizes, G=SMALL["G"], Q=SMALL["Q"], D=SMALL["D"], candidates=1)
    share = RankShare(spots=SMALL["B"], images=SMALL["B"], columns=SMALL["M"], table_rows=24, precision=FP32, gpu=gpu)
    parts = {
        "pool": pooling(sizes, share, SMALL["B"]),
        "nce": infonce(sizes, share),
        "level": level(sizes, share),
        "pair": pair(sizes, share),
    }
    return {name: (total(costs, "flops"), total(costs, "back_flops")) for name, costs in parts.items()}


@pytest.fixture(scope="module")
def any_sizes(tiny_overrides: list[str]) -> Sizes:
    return sizes_of(load_config(None, tiny_overrides), Inputs(tile_px=32, trained_genes=30))


def test_flops_of_each_loss_on_a_cpu(any_sizes: Sizes):
    B, M, G, Q, D = SMALL.values()
    images, texts, table = (torch.randn(n, D, requires_grad=True) for n in (B, M, G * Q))
    levels, measured, scale = torch.randint(0, Q, (B, G)), torch.ones(B, G, dtype=torch.bool), torch.tensor(5.0)
    rows = torch.nn.functional.normalize(table, dim=-1).view(G, Q, D)
    losses = {
        "nce": lambda: kernels.infonce(images, texts, scale, impl="cpu"),
        "level": lambda: kernels.level_cross_entropy(images, rows, levels, measured, scale, impl="cpu"),
        "pair": lambda: sum(kernels.pair_scores(images, rows, levels, impl="cpu").sum() for _ in range(2)),
    }
    predicted = loss_parts(any_sizes, gpu=False)
    for name, loss in losses.items():
        with FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS) as forward:
            value = loss()
        with FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS) as backward:
            value.backward(retain_graph=True)
        counted = forward.get_total_flops(), backward.get_total_flops()
        assert predicted[name] == pytest.approx(counted, rel=1e-9), name


def test_flops_of_a_gpu_step_equal_the_registered_formulas(any_sizes: Sizes):
    """The plan reads ``comtip_kernels.flops``; the operators of the Triton path register the same functions."""
    from comtip_kernels.gene_sentence_embedding import triton_op as _embedding  # noqa: F401
    from comtip_kernels.infonce import triton_op as _infonce  # noqa: F401
    from comtip_kernels.packed_attention import triton_op as _attention  # noqa: F401
    from comtip_kernels.sentence_table import triton_op as _table  # noqa: F401

    B, M, G, Q, D = SMALL.values()
    images, texts, table, levels = (torch.empty(s, device="meta") for s in ((B, D), (M, D), (G, Q, D), (B, G)))

    def registered(operator: Any, *args: Any) -> int:
        return int(flop_registry[operator](*args))

    ops = torch.ops.comtip
    dot = registered(ops.sampled_dot, images, table, levels)
    weighted = registered(ops.weighted_sum, levels, table, levels)
    transposed = registered(ops.weighted_sum_transpose, images, levels, levels, Q)
    level_forward = registered(ops.level_loss, images, table)
    assert dot == weighted == transposed == 2 * B * G * Q * D
    assert loss_parts(any_sizes, gpu=True) == {
        "pool": (weighted, dot + transposed),
        "nce": (registered(ops.infonce_lse, images, texts), registered(ops.infonce_grads, images, texts)),
        "level": (level_forward, registered(ops.level_loss_grads, images, table)),
        "pair": (2 * dot, 2 * (weighted + transposed)),
    }
    share = RankShare(spots=B, images=B, columns=M, table_rows=1000, precision=FP32, gpu=True)
    attend = text_attention(any_sizes, share)
    tokens = round(1000 * any_sizes.tokens)
    q = torch.empty(tokens, any_sizes.text_heads, any_sizes.width // any_sizes.text_heads, device="meta")
    counted = [
        registered(ops.packed_attention, q, q, q, None, any_sizes.longest),
        registered(ops.packed_attention_grads, q, q, q, q, None, any_sizes.longest),
    ]
    assert [attend.flops, attend.back_flops] == pytest.approx(counted, rel=1e-2)


@pytest.mark.parametrize("levels", [2, 10, 32, 100, 256])
def test_chunks_of_the_level_loss_are_whole_tiles(levels: int):
    from comtip_kernels.sentence_table import triton_kernels, triton_op

    tiles = triton_op.choose_tiles(triton_kernels.LEVEL_GRADIENT, torch.empty(1, dtype=torch.bfloat16), levels, 512)
    for spots in (1, 1000, 70_000):
        genes = flops.level_chunk(spots, levels, 2)
        assert genes % tiles["NG"] == 0
        assert genes == 64 or genes * spots * levels * 2 <= flops.CHUNK_BYTES


@pytest.mark.parametrize("element", [2, 4])
def test_bytes_of_a_chunk_are_those_of_its_buffer(element: int):
    limit = flops.CHUNK_BYTES
    assert flops.infonce_chunk_bytes(100, 130, element) == 100 * 192 * element  # all rows, padded to 64 columns
    assert flops.infonce_chunk_bytes(10**6, 65_536, element) == limit
    assert (
        flops.infonce_chunk_bytes(10**6, 3_000_000, element) == 128 * 3_000_000 * element > limit
    )  # a tile of rows is more
    assert flops.level_chunk_bytes(10, 3, 7, element) == 10 * 64 * element
    assert flops.level_chunk_bytes(1024, 10**5, 32, element) == limit
    assert flops.level_chunk_bytes(200_000, 10**5, 32, element) == 64 * 200_000 * 32 * element > limit


def test_the_plan_has_the_chunks_of_more_than_the_limit(any_sizes: Sizes):
    """The least chunk is 128 rows or 64 genes; the plan counted 256 MiB where those are more."""
    share = RankShare(spots=200_000, images=200_000, columns=3_000_000, table_rows=1000, precision=AUTOCAST, gpu=True)
    rows = {row.name: row.bytes for row in step_rows(any_sizes, EngineSpec(), share, [], 1)}
    assert rows["InfoNCE: derivatives of the logits"] == 128 * 3_000_000 * 2
    s = replace(any_sizes, G=1000, Q=32)
    level = {row.name: row.bytes for row in step_rows(s, EngineSpec(), share, [], 1)}[
        "L_level: derivatives of the scores"
    ]
    assert level == 64 * 200_000 * 32 * 2 > flops.CHUNK_BYTES
