"""Launches: on the device of their tensors, and compiled in few variants although sizes change every step."""

import ast
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the JIT's keys are those of compiled kernels", allow_module_level=True)

import triton
from comtip_kernels import SentenceSizes, dispatch, plan_panel, plan_sentences, tl_common
from comtip_kernels.block_pointwise import triton_op as pointwise
from comtip_kernels.gene_sentence_embedding import triton_op as embedding
from comtip_kernels.infonce import blocks_triton_op as blocks
from comtip_kernels.infonce import triton_op as infonce
from comtip_kernels.one_query_attention import triton_op as one_query
from comtip_kernels.packed_attention import biased_triton_op as biased
from comtip_kernels.packed_attention import triton_op as attention
from comtip_kernels.sentence_table import triton_op as table
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

KERNELS = Path(__file__).parents[2] / "kernels/comtip_kernels"


def test_every_launch_goes_through_the_guard():
    """``kernel[grid](...)`` launches on the current device, which need not be that of the tensors."""
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and path.name != "tl_common.py":
                pytest.fail(f"{path.name}:{node.lineno} calls a subscript; launch kernels with tl_common.launch")


def test_a_launch_makes_the_device_of_its_tensors_current(monkeypatch: pytest.MonkeyPatch):
    events: list[object] = []

    @contextmanager
    def device(index: torch.device) -> Iterator[None]:
        events.append(index)
        yield
        events.append("left")

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: events.append((grid, options))

    class OnSecondGpu:
        device = torch.device("cuda:1")

    monkeypatch.setattr(torch.cuda, "device", device)
    tl_common.launch(Kernel(), (3,), OnSecondGpu(), BM=16)
    assert events == [torch.device("cuda:1"), ((3,), {"BM": 16}), "left"]
    tl_common.launch(Kernel(), (3,), torch.zeros(1))
    assert events[3:] == [((3,), {})]


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, ...], set[str]]:
    """Keys under which the JIT would cache compiled kernels, by kernel and constants, in place of launches."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    seen: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    binders: dict[Any, Any] = {}

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if kernel not in binders:
            binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, rest = binders[kernel](*args, **options)
        dtypes = tuple(str(a.dtype) for a in args if isinstance(a, torch.Tensor))
        tile_class = tuple(sorted((k, str(v)) for k, v in options.items()))
        seen[kernel.__name__, dtypes, tile_class].add(f"{specialization} {rest}")

    for module in (infonce, table, attention, biased, one_query, embedding, pointwise):
        monkeypatch.setattr(module, "launch", record)
    return seen


def draws(steps: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield batch, further texts, genes and tokens as training draws them; awkward values come first."""
    yield from ((1, 0, 1, 1), (16, 0, 16, 16), (17, 1, 32, 2), (1024, 1024, 2048, 4096))
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        b, m, genes, tokens = (int(torch.randint(1, top, (1,), generator=g)) for top in (65, 65, 130, 900))
        yield b, m, genes, tokens


def step(b: int, m: int, genes: int, tokens: int, dtype: torch.dtype) -> None:
    """Call every operator once, forward and backward, at these sizes."""
    bf16, D, Q = dtype == torch.bfloat16, 64, 5
    x, y = torch.zeros(b, D), torch.zeros(b + m, D)
    scale, stats = torch.tensor(1.0), torch.zeros(b + m)
    sections, classes, excluded = (torch.zeros(b + m, dtype=t) for t in (torch.int32, torch.int64, torch.int32))
    ids = (1, sections[:b], sections, classes[:b], classes, excluded[:b], bf16)
    infonce.infonce_lse(x, y, scale, *ids)
    infonce.infonce_grads(x, y, scale, stats[:b], stats[:b], stats[:b], stats[:b], *ids)
    start = b // 2  # a block begins anywhere in the tensors of ids
    block = (1, sections[start:b], sections, classes[start:b], classes, excluded[start:b], excluded, bf16)
    blocks.infonce_block_lse(x[start:b], y, scale, *block)
    of_rows, of_columns = (stats[start:b], stats[start:b]), (stats, stats)
    blocks.infonce_block_grads(x[start:b], y, scale, *of_rows, *of_columns, *block)
    rows, levels = torch.zeros(genes, Q, D), torch.zeros(b, genes, dtype=torch.uint8)
    weight = torch.zeros(b, genes)
    table.sampled_dot(x, rows, levels, bf16)
    table.weighted_sum(weight, rows, levels, bf16)
    table.weighted_sum_transpose(x, weight, levels, Q, bf16)
    prior = torch.zeros(genes, Q)
    table.level_loss(x, rows, levels, levels, scale, prior, bf16)
    table.level_loss_grads(x, rows, levels, levels, scale, prior, scale, bf16)
    longest = 2 + tokens % 15
    q = torch.zeros(tokens, 3, 2, 32, dtype=dtype).unbind(1)
    first = torch.zeros(tokens, dtype=torch.int32)
    attention.attend(*q, first, longest)
    attention.attend_grads(*q, torch.zeros(tokens, 2, 32, dtype=dtype), first, longest)
    query, tokens_x = torch.zeros(2, genes, D, dtype=dtype).transpose(0, 1), torch.zeros(tokens, D, dtype=dtype)
    starts = torch.zeros(genes + 3, dtype=torch.int64)
    one_query.attend(query, tokens_x, starts[:genes], starts, longest, 0.1)
    one_query.attend_grads(query, tokens_x, query, starts, starts, longest, 0.1)
    embed(genes, tokens, D, dtype)
    between_products(b, tokens, D, dtype)


def between_products(images: int, tokens: int, D: int, dtype: torch.dtype) -> None:
    """Call the operators of a block between its products, for sentences and for images in two parts."""
    bias, first = torch.zeros(3 * D), torch.zeros(tokens, dtype=torch.int32)
    parts = [50, 26] if dtype == torch.bfloat16 else [30, 14]
    for rows, where in ((tokens, (first, [17])), (images * sum(parts), (None, parts))):
        qkv = torch.zeros(rows, 3, 2, D // 2, dtype=dtype)
        biased.attend(qkv, bias, *where)
        biased.attend_grads(qkv, bias, qkv[:, 0].contiguous(), *where)
        x, branch = torch.zeros(rows, D), torch.zeros(rows, D, dtype=dtype)
        stream, out, stats = pointwise._norm(x, branch, bias[:D], bias[:D], bias[:D], 1e-5, dtype)
        pointwise._norm_grads(out, stream, stream, stats, bias[:D], dtype)
        wide = torch.zeros(rows, 2 * D, dtype=dtype)
        pointwise._gelu(wide, bias[: 2 * D])
        pointwise._gelu_grads(wide, wide, bias[: 2 * D])


def embed(genes: int, tokens: int, D: int, dtype: torch.dtype) -> None:
    ids = torch.arange(genes * 3).view(genes, 3) % 40
    length = torch.full((genes,), 3)
    plan = plan_sentences(ids, length, torch.zeros(genes, dtype=torch.int64))
    tables = [torch.zeros(n, D, dtype=dtype) for n in (41, 3, 3, 5)]
    gain = torch.zeros(D, dtype=dtype)
    zero = torch.zeros_like(plan.token_U)
    names = (plan.token_U, plan.kind_U, plan.slot_U, zero, None, None, None, plan.genes, plan.names)
    rows = embedding.sentence_rows(*tables, None, gain, gain, 1e-5, *names)
    embedding.copy_rows(rows, plan.row_S, plan.order_S, plan.start_U1, plan.most)
    embedding.sum_equal_tokens(torch.zeros(genes * 3, D, dtype=dtype), plan.order_S, plan.start_U1, 300)
    embedding.sentence_rows_grads(torch.zeros_like(rows, dtype=torch.float32), *tables, None, gain, gain, 1e-5, *names)


def public_kernels(path: Path) -> set[str]:
    """Return the names of the kernels that a file defines; functions of kernels begin with an underscore."""
    functions = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)]
    jitted = [f for f in functions if any("jit" in ast.unparse(d) for d in f.decorator_list)]
    return {f.name for f in jitted if not f.name.startswith("_")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_sizes_that_change_every_step_compile_few_variants(
    dtype: torch.dtype, variants: dict[tuple[Any, ...], set[str]]
):
    for sizes in draws(60):
        step(*sizes, dtype)
    names = {name for name, _, _ in variants}
    kernels = {n for p in KERNELS.rglob("triton_kernels.py") for n in public_kernels(p)}
    assert names == kernels
    too_many = {key[0]: len(keys) for key, keys in variants.items() if len(keys) > 2}
    assert not too_many
    # By kernel over all tile classes, so that a class that follows the sizes would show.
    total = defaultdict(int)
    for (name, _, _), keys in variants.items():
        total[name] += len(keys)
    assert max(total.values()) <= 4, dict(total)


def test_no_variant_is_new_after_step_20_of_2000(variants: dict[tuple[Any, ...], set[str]]):
    """A kernel that compiles late stops one rank while the others wait; at most 30 variants in all."""
    g = torch.Generator().manual_seed(1)
    panels = (256 ** torch.rand(2000, generator=g)).long().clamp(min=1).tolist()
    tokens = torch.randint(200, 900, (2000,), generator=g).tolist()
    last = 0
    for number, (genes, count) in enumerate(zip(panels, tokens, strict=True), 1):
        before = sum(map(len, variants.values()))
        # Batch, further texts and the longest sentence are those of the config; panel and tokens are drawn.
        step(32, 32, genes, count - count % 15 + 6, torch.bfloat16)
        if sum(map(len, variants.values())) > before:
            last = number
    assert last <= 20
    assert sum(map(len, variants.values())) <= 30


def test_a_panel_of_any_size_runs_the_same_kernels(variants: dict[tuple[Any, ...], set[str]]):
    """Each tile class of the embedding is compiled once, dtypes included, over 2,000 drawn panels."""
    g = torch.Generator().manual_seed(0)
    sizes = (256 ** torch.rand(2000, generator=g)).long().tolist()
    D, Q, T = 16, 2, 3
    tables = [torch.zeros(n, D) for n in (41, 3, T, Q)]
    gain = torch.zeros(D)
    for genes in (1, 16, 17, 600, *sizes):
        ids = (torch.arange(genes * Q * T) // Q).view(-1, T) % 40
        length, index = torch.full((genes * Q,), T), torch.arange(genes * Q)
        known = SentenceSizes(genes * Q * T, genes, -(-min(genes, 40) // 64) * 64, Q, 41)
        plan = plan_panel(ids, length, index % Q, index // Q, known)
        zero = torch.zeros_like(plan.token_U)
        names = (plan.token_U, plan.kind_U, plan.slot_U, zero, None, None, None, plan.genes, plan.names)
        rows = embedding.sentence_rows(*tables, None, gain, gain, 1e-5, *names)
        out = embedding.copy_rows(rows, plan.row_S, plan.order_S, plan.start_U1, plan.most)
        embedding.sum_equal_tokens(torch.zeros_like(out), plan.order_S, plan.start_U1, plan.most)
        grads = torch.zeros_like(rows)
        embedding.sentence_rows_grads(grads, *tables, None, gain, gain, 1e-5, *names)
    by_class: dict[tuple[Any, ...], set[Any]] = defaultdict(set)
    for (name, dtypes, tile_class), keys in variants.items():
        by_class[name, tile_class] |= {(dtypes, key) for key in keys}
    assert {name for name, _ in by_class} == {"make_rows", "copy_rows", "sum_pieces", "norm_grads"}
    assert {key[0]: len(keys) for key, keys in by_class.items() if len(keys) > 1} == {}


def test_an_old_triton_is_refused_on_a_gpu_that_it_cannot_compile_for(monkeypatch: pytest.MonkeyPatch):
    """The compiler of Triton 3.6 would abort the process in the first training step."""

    class Operand:
        device, dtype = torch.device("cuda:0"), torch.bfloat16

    implementations = {"triton": max, "reference": min}
    for version, capability, runs in (
        ("3.6.0", (9, 0), True),
        ("3.7.1", (10, 0), False),
        ("3.8.0", (10, 0), True),
        ("3.10.0", (12, 0), True),
    ):
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, found=capability: found)
        for impl in ("auto", "triton"):
            if runs:
                assert dispatch.choose("infonce", impl, [Operand()], implementations) is max
            else:
                with pytest.raises(
                    ValueError, match=r"Triton 3\.7\.1 cannot compile .* for sm_100; install a PyTorch with Triton 3\.8"
                ):
                    dispatch.choose("infonce", impl, [Operand()], implementations)
        assert dispatch.choose("infonce", "reference", [Operand()], implementations) is min


@pytest.mark.parametrize("configs", [table.kernels.SAMPLED_DOT, table.kernels.LEVEL_GRADIENT])
@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "highest"), ("float32", "high"), ("float32", "highest")])
def test_a_tile_of_one_gene_with_256_levels_fits(configs: dict[str, dict[str, Any]], dtype: str, precision: str):
    """With the spots of a narrower tile, tf32 needs 240 of 227 KiB on sm_90, and bf16 spills."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        tiles = table.choose_tiles(configs, torch.empty(1, dtype=getattr(torch, dtype)), 256, 512)
    finally:
        torch.set_float32_matmul_precision(before)
    columns, element = tiles["NG"] * tiles["QP"], getattr(torch, dtype).itemsize
    assert tiles["BM"] * columns <= configs["bf16"]["BM"] * configs["bf16"]["BN"]
    assert tiles["num_stages"] * (tiles["BM"] + columns) * tiles["BK"] * element <= 227 * 1024


def test_narrow_rows_have_fewer_warps():
    """With the warps of wide rows, ``norm_grads`` spills on sm_90 (``bench/ledger.csv``)."""
    assert [embedding.kernels.norm_options(width)["num_warps"] for width in (16, 128, 256, 512)] == [1, 1, 2, 2]


@pytest.mark.parametrize("levels", [2, 10, 32, 256])
@pytest.mark.parametrize("config", [table.kernels.WEIGHTED_SUM, table.kernels.WEIGHTED_SUM_TRANSPOSE])
def test_the_weights_of_a_tile_stay_small(config: dict[str, dict[str, Any]], levels: int):
    """One gene of 256 levels, with all spots or the whole width of a tile, spills on sm_80."""
    tiles = table.choose_tiles(config, torch.empty(1, dtype=torch.bfloat16), levels, 512)
    assert tiles["BM"] == config["bf16"]["BM"] // (2 if levels == 256 else 1)
    assert tiles["NG"] * tiles["QP"] * tiles["BD"] <= config["bf16"]["BN"] * config["bf16"]["BD"]


def test_a_small_batch_has_programs_for_every_multiprocessor():
    """By parts of the panel, whose number depends on sizes alone."""
    tiles = table.choose_tiles(table.kernels.WEIGHTED_SUM, torch.empty(1, dtype=torch.bfloat16), 32, 512)
    parts = {spots: table.gene_parts(tiles, spots, 2048, 512) for spots in (1024, 4096, 16384)}
    assert parts == {1024: (16, 128), 4096: (4, 512), 16384: (1, 2048)}
    assert table.gene_parts(tiles, 1024, 0, 512) == (1, 2)  # an empty panel has one part, whose sum is 0
    assert table.gene_parts(tiles, 1024, 130, 512) == (2, 66)
