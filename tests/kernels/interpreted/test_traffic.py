"""The ledger's formulas equal what the interpreter counts: see tests/kernels/test_interpreted.py."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels import flops, plan_sentences, tiles
from comtip_kernels.block_pointwise import triton_op as pointwise
from comtip_kernels.gene_sentence_embedding import triton_kernels as embedding_kernels
from comtip_kernels.gene_sentence_embedding import triton_op as embedding
from comtip_kernels.infonce import blocks_triton_op as blocks
from comtip_kernels.infonce import triton_kernels as infonce_kernels
from comtip_kernels.infonce import triton_op as infonce
from comtip_kernels.ledger import traffic
from comtip_kernels.ledger.count import Counted, counting
from comtip_kernels.one_query_attention import triton_op as one_query
from comtip_kernels.packed_attention import biased_triton_op as biased
from comtip_kernels.packed_attention import triton_kernels as attention_kernels
from comtip_kernels.packed_attention import triton_op as attention
from comtip_kernels.sentence_table import triton_kernels as table_kernels
from comtip_kernels.sentence_table import triton_op as table
from comtip_kernels.tiles import one_query_tiles
from comtip_kernels.tl_common import fit_tiles


def same(counted: Counted, formula: traffic.Traffic) -> None:
    got = (counted.loaded, counted.distinct, counted.stored, counted.flops)
    assert got == (formula.loaded, formula.distinct, formula.stored, formula.flops)


def vectors(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.mark.parametrize(("B", "M", "D"), [(20, 20, 16), (40, 71, 48), (64, 64, 600)])
def test_infonce(B: int, M: int, D: int):
    x, y, scale = vectors(B, D), vectors(M, D), torch.tensor(5.0)
    nothing = (0, None, None, None, None, None, False)
    with counting() as counted:
        rows, columns, _ = infonce.infonce_lse(x, y, scale, *nothing)
    counted.loaded -= 2 * 4 * B  # exact_lse reads which rows and columns are low, and finds none
    forward = traffic.infonce_forward(B, M, D, 4, fit_tiles(infonce_kernels.FORWARD["tf32x3"], D, infonce.SMALL))
    assert (counted.loaded, counted.stored, counted.flops) == (forward.loaded, forward.stored, forward.flops)
    half = torch.full((B,), 0.5)
    with counting() as counted:
        infonce.infonce_grads(x, y, scale, half, half, rows, columns, *nothing)
    tiles = fit_tiles(infonce_kernels.GRADIENT["tf32x3"], D, infonce.SMALL)
    backward = traffic.infonce_gradient(B, M, D, 4, tiles)
    assert (counted.loaded, counted.stored, counted.flops) == (backward.loaded, backward.stored, backward.flops)


@pytest.mark.parametrize(("R", "C", "D", "chunk"), [(20, 20, 16, False), (200, 71, 48, True)])
def test_infonce_block(R: int, C: int, D: int, chunk: bool, monkeypatch: pytest.MonkeyPatch):
    if chunk:
        monkeypatch.setattr(flops, "CHUNK_BYTES", 1)
    x, y, scale = vectors(R, D), vectors(C, D), torch.tensor(5.0)
    classes, excluded = (torch.arange(R), torch.arange(C) + R), [torch.zeros(n, dtype=torch.int32) for n in (R, C)]
    who = (0, None, None, *classes, *excluded, False)
    with counting() as counted:
        rows, columns = blocks.infonce_block_lse(x, y, scale, *who)
    counted.loaded -= 4 * (R + C)  # exact_lse reads which rows and columns are low, and finds none
    tiles, ids = fit_tiles(infonce_kernels.FORWARD["tf32x3"], D, infonce.SMALL), traffic.BLOCK_IDS
    forward = traffic.infonce_forward(R, C, D, 4, tiles, ids, diagonal=False)
    assert (counted.loaded, counted.stored, counted.flops) == (forward.loaded, forward.stored, forward.flops)
    with counting() as counted:
        blocks.infonce_block_grads(x, y, scale, torch.ones(R), rows, torch.ones(C), columns, *who)
    tiles = fit_tiles(infonce_kernels.GRADIENT["tf32x3"], D, infonce.SMALL)
    rows = [min(128, R - first) for first in range(0, R, 128)] if chunk else [R]
    backward = sum((traffic.infonce_gradient(n, C, D, 4, tiles, ids) for n in rows), traffic.Traffic(0, 0, 0))
    assert (counted.loaded, counted.stored, counted.flops) == (backward.loaded, backward.stored, backward.flops)


@pytest.mark.parametrize(("N", "D"), [(12, 8), (40, 20)])
def test_embedding(N: int, D: int):
    g = torch.Generator().manual_seed(N)
    ids = torch.randint(1, 9, (N // 3, 6), generator=g).repeat_interleave(3, 0)
    ids[:, 0] = 1
    length = torch.randint(2, 7, (N // 3,), generator=g).repeat_interleave(3)
    own, level = torch.arange(1, N // 3 + 1).repeat_interleave(3), torch.arange(3).repeat(N // 3)
    plan = plan_sentences(ids, length, level, identity_N=own)
    tables = [torch.randn(n, D, generator=g) for n in (9, 3, 6, 3, N // 3 + 1)]
    gain, bias, at = torch.ones(D), torch.zeros(D), plan.sentence_U
    names = (plan.token_U, plan.kind_U, plan.slot_U, level[at], None, None, own[at], plan.genes, plan.names)
    kinds = [int((plan.kind_U == k).sum()) for k in range(3)]
    S, U = plan.row_S.shape[0], at.shape[0]
    read = sum(
        t.unique().numel()
        for t in (
            plan.token_U[plan.kind_U < 2],
            plan.kind_U,
            plan.slot_U,
            level[at][plan.kind_U == 2],
            own[at][plan.kind_U == 0],
        )
    )
    # An id is read where its kind needs it: tokens by genes and names, levels by values, all three by none.
    read_tables = read * D * 4
    with counting() as counted:
        rows = embedding.sentence_rows(*tables, gain, bias, 1e-5, *names)
    same(counted, traffic.sentence_rows(*kinds, D, 4, read_tables + 2 * D * 4))
    with counting() as counted:
        embedding.copy_rows(rows, plan.row_S, plan.order_S, plan.start_U1, plan.most)
    same(counted, traffic.copy_rows(S, U, D, 4))
    with counting() as counted:
        summed = embedding.sum_equal_tokens(torch.randn(S, D), plan.order_S, plan.start_U1, plan.most)
    same(counted, traffic.sum_tokens(S, U, D, 4))
    with counting() as counted:
        embedding.sentence_rows_grads(summed, *tables, gain, bias, 1e-5, *names)
    same(counted, traffic.norm_grads(*kinds, D, 4, embedding_kernels.NORM_ROWS, read_tables + D * 4))


@pytest.mark.parametrize(
    ("lengths", "H", "E"), [([3], 1, 16), ([5, 7, 3, 2, 6, 9, 4], 2, 20), ([10] * 30, 1, 8), ([30, 3, 20], 2, 16)]
)
def test_attention(lengths: list[int], H: int, E: int):
    length = torch.tensor(lengths)
    first = torch.repeat_interleave((length.cumsum(0) - length).int(), length)
    S, longest = sum(lengths), max(lengths)
    q, k, v, g = (torch.randn(S, H, E) for _ in range(4))
    tile = attention_kernels.best_tile("tf32x3", longest)
    with counting() as counted:
        attention.attend(q, k, v, first, longest)
    same(counted, traffic.attention(S, H, E, 4, longest, tile, backward=False))
    with counting() as counted:
        attention.attend_grads(q, k, v, g, first, longest)
    same(counted, traffic.attention(S, H, E, 4, longest, tile, backward=True))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("T", "E", "dtype"), [(5, 16, torch.float32), (32, 20, torch.float32), (50, 20, torch.bfloat16)], ids=str
)
def test_image_attention(T: int, E: int, dtype: torch.dtype, bias: bool):
    images, H = 3, 2
    qkv = torch.randn(images * T, 3, H, E).to(dtype)
    given = (qkv, torch.randn(3 * H * E) if bias else None)
    tile, size = flops.image_tile(T), dtype.itemsize
    with counting() as counted:
        out = biased.attend(*given, None, [T])
    same(counted, traffic.image_attention(images, T, H, E, size, tile, backward=False, bias=bias))
    with counting() as counted:
        biased.attend_grads(*given, out, None, [T])
    same(counted, traffic.image_attention(images, T, H, E, size, tile, backward=True, bias=bias))


@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("N", "d"), [(1, 16), (129, 33), (5, 1100)])
def test_work_between_products(N: int, d: int, branch: torch.dtype):
    x, y, vectors, size = torch.randn(N, d), torch.randn(N, d).to(branch), torch.randn(3, d).unbind(0), branch.itemsize
    with counting() as counted:
        stream, out, stats = pointwise._norm(x, y, *vectors, 1e-5, branch)
    same(counted, traffic.residual_norm(N, d, 4, size, tiles.norm_tiles(d)))
    with counting() as counted:
        pointwise._norm_grads(out, stream * 2, stream, stats, vectors[1], branch)
    same(counted, traffic.residual_norm_grads(N, d, 4, size, tiles.POINTWISE_ROWS))
    with counting() as counted:
        pointwise._gelu(y, vectors[0])
    same(counted, traffic.bias_gelu(N, d, size, tiles.GELU))
    with counting() as counted:
        pointwise._gelu_grads(y * 2, y, vectors[0])
    same(counted, traffic.bias_gelu_grads(N, d, size, tiles.POINTWISE_ROWS))


@pytest.mark.parametrize(("lengths", "H", "D"), [([3], 1, 16), ([5, 7, 3, 2, 6, 9, 4], 2, 20), ([20, 1, 33], 5, 72)])
def test_one_query_attention(lengths: list[int], H: int, D: int):
    length, (N, S, longest) = torch.tensor(lengths), (len(lengths), sum(lengths), max(lengths))
    first = length.cumsum(0) - length
    query, grad, x = torch.randn(N, H, D), torch.randn(N, H, D), torch.randn(S, D)
    tiles = one_query_tiles("tf32x3", H, D, longest)
    with counting() as counted:
        one_query.attend(query, x, first, length, longest, 0.5)
    same(counted, traffic.one_query_attention(N, S, H, D, 4, tiles, backward=False))
    with counting() as counted:
        one_query.attend_grads(query, x, grad, first, length, longest, 0.5)
    same(counted, traffic.one_query_attention(N, S, H, D, 4, tiles, backward=True))


@pytest.mark.parametrize(("B", "G", "Q", "D"), [(9, 4, 3, 8), (33, 19, 10, 40), (9, 130, 3, 8)])
def test_table(B: int, G: int, Q: int, D: int):
    image, rows = vectors(B, D), vectors(G, Q, D)
    levels = torch.randint(Q, (B, G)).to(torch.uint8)
    with counting() as counted:
        taken = table.sampled_dot(image, rows, levels, False)
    tiles = table.choose_tiles(table_kernels.SAMPLED_DOT, image, Q, D)
    same(counted, traffic.sampled_dot(B, G, Q, D, 4, tiles))
    with counting() as counted:
        table.level_loss(
            image, rows, levels, torch.ones(B, G, dtype=torch.uint8), torch.tensor(5.0), torch.zeros(G, Q), False
        )
    tiles = table.choose_tiles(table_kernels.LEVEL_LOSS, image, Q, D)
    same(counted, traffic.sampled_dot(B, G, Q, D, 4, tiles, loss=True))
    with counting() as counted:
        table.weighted_sum(taken, rows, levels, False)
    summed = table.choose_tiles(table_kernels.WEIGHTED_SUM, image, Q, D)
    same(counted, traffic.weighted_sum(B, G, Q, D, 4, summed, table.gene_parts(summed, B, G, D)[0]))
    with counting() as counted:
        table.weighted_sum_transpose(image, taken, levels, Q, False)
    same(
        counted,
        traffic.weighted_sum_transpose(
            B, G, Q, D, 4, table.choose_tiles(table_kernels.WEIGHTED_SUM_TRANSPOSE, image, Q, D)
        ),
    )


def genes_in_order(counted: Counted, rows: torch.Tensor) -> list[int]:
    """Return the first gene of every load from a contiguous table, in the order of the programs."""
    first, size = rows.data_ptr(), rows.nbytes
    inside = [page[0] - first for page in counted._pages if page.size and first <= page[0] < first + size]
    return [int(offset) // rows[0].nbytes for offset in inside]


@pytest.mark.parametrize("operation", ["scores", "loss", "gradient"])
def test_programs_take_all_spots_before_the_next_genes(operation: str):
    """So a table that exceeds the L2 cache is read from memory once: ``again`` of the formulas, which counts cannot show."""
    B, G, Q, D = 70, 9, 8, 16
    image, rows, levels = vectors(B, D), vectors(G, Q, D), torch.randint(Q, (B, G)).to(torch.uint8)
    weight, scale, prior = torch.ones(B, G, dtype=torch.uint8), torch.tensor(5.0), torch.zeros(G, Q)
    with counting() as counted:
        {
            "scores": lambda: table.sampled_dot(image, rows, levels, False),
            "loss": lambda: table.level_loss(image, rows, levels, weight, scale, prior, False),
            "gradient": lambda: table.level_loss_grads(image, rows, levels, weight, scale, prior, scale, False),
        }[operation]()
    genes = genes_in_order(counted, rows)
    assert len(set(genes)) > 1
    assert len(genes) > 2 * len(set(genes))
    assert genes == sorted(genes)


@pytest.mark.parametrize(("B", "G", "Q", "D"), [(9, 4, 3, 8), (33, 70, 10, 40), (20, 3, 5, 300)])
def test_gradients_of_level_loss(B: int, G: int, Q: int, D: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flops, "CHUNK_BYTES", 1)  # 64 genes at a time
    image, rows = vectors(B, D), vectors(G, Q, D)
    levels, weight = torch.randint(Q, (B, G)).to(torch.uint8), torch.ones(B, G, dtype=torch.uint8)
    with counting() as counted:
        table.level_loss_grads(
            image, rows, levels, weight, torch.tensor(5.0), torch.zeros(G, Q), torch.tensor(1.0), False
        )
    tiles = table.choose_tiles(table_kernels.LEVEL_GRADIENT, image, Q, D)
    chunks = [min(64, G - first) for first in range(0, G, 64)]
    want = sum((traffic.level_gradient(B, n, Q, D, 4, tiles) for n in chunks), traffic.Traffic(0, 0, 0))
    assert (counted.loaded, counted.stored, counted.flops) == (want.loaded, want.stored, want.flops)
    if len(chunks) == 1:
        assert counted.distinct == want.distinct
