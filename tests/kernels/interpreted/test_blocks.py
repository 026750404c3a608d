"""InfoNCE's blocks and the loss over several ranks on Triton kernels: see tests/kernels/test_interpreted.py."""

import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside tests/kernels/test_interpreted.py", allow_module_level=True)

from comtip_kernels import flops, infonce
from comtip_kernels.dispatch import prefer
from comtip_kernels.infonce import blocks_triton_op as blocks_op
from comtip_kernels.infonce.blocks import BlockIds, block_gradients, block_lse
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from comtip_fast.collectives import counts_of, share_of
from comtip_fast.objectives import PairMetadata, global_infonce
from testkit.ranks import Rank, Ranks

F64 = torch.float64
RULES = ("all", "same_group", "other_group")
FORWARD_ONLY = ("test_schema", "test_faketensor")


def block(
    R: int, C: int, D: int, rule: str = "all", excluded: bool = True
) -> tuple[torch.Tensor, torch.Tensor, BlockIds]:
    g = torch.Generator().manual_seed(R * 31 + C)
    x, y = (F.normalize(torch.randn(n, D, generator=g), dim=-1) for n in (R, C))
    # Some of the same text; others agree in their low 32 bits alone, and are negatives.
    low, high = ([torch.randint(k, (n,), generator=g) for n in (R, C)] for k in (3, 4))
    rows, columns = (a + (b << 32) for a, b in zip(low, high, strict=True))
    groups = [torch.randint(3, (n,), generator=g) for n in (R, C)]
    mute = [torch.rand(n, generator=g) < 0.3 for n in (R, C)] if excluded else [None, None]
    return x, y, BlockIds(rule, *groups, rows, columns, *mute)


def all_of(impl: str, x: torch.Tensor, y: torch.Tensor, scale: float, ids: BlockIds) -> list[torch.Tensor]:
    """Return statistics and gradients; the lse handed in is as large as a whole row's, whose positive lies elsewhere."""
    s = torch.tensor(scale, dtype=torch.float64 if x.dtype == F64 else torch.float32)
    wide = torch.promote_types(x.dtype, torch.float32)
    lse = block_lse(x, y, s, ids, impl=impl)
    truth = block_lse(x.to(F64), y.to(F64), s.double(), ids, impl="reference")
    rows, columns = (torch.logaddexp(t, torch.tensor(0.3 * scale, dtype=F64)).to(wide) for t in truth)
    row_weight, column_weight = (torch.linspace(0.1, 1, t.shape[0], dtype=wide) for t in truth)
    row_weight[::4] = 0
    column_weight[columns.shape[0] // 2 :] = 0  # further columns, whose log-sum-exp does not exist
    columns[columns.shape[0] // 2 :] = 0
    return [*lse, *block_gradients(x, y, s, ids, row_weight, rows, column_weight, columns, impl=impl)]


def same(got: list[torch.Tensor], want: list[torch.Tensor], rtol: float = 2e-5, atol: float = 2e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.to(F64), b.to(F64), rtol=rtol, atol=atol)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("R", "C", "D"), [(1, 1, 4), (33, 35, 20), (70, 40, 48)])
def test_equals_reference_and_cpu(R: int, C: int, D: int, rule: str):
    x, y, ids = block(R, C, D, rule)
    got = all_of("triton", x, y, 9.0, ids)
    assert all(t.dtype == torch.float32 for t in got)
    same(got, all_of("reference", x.to(F64), y.to(F64), 9.0, ids))
    same(got, all_of("cpu", x, y, 9.0, ids))


def test_classes_are_compared_as_64_bits():
    x, y, _ = block(3, 3, 8)
    rows, columns = torch.tensor([1, 2, 3]), torch.tensor([1 + (1 << 32), 2, 3 - (1 << 40)])
    ids = BlockIds("all", None, None, rows, columns, None)
    logits = (5.0 * x @ y.T).masked_fill(rows[:, None] == columns, -torch.inf)
    same(list(block_lse(x, y, torch.tensor(5.0), ids, impl="triton")), [logits.logsumexp(1), logits.logsumexp(0)])


@pytest.mark.parametrize("excluded", ["rows", "columns"])
def test_only_rows_or_only_columns_are_silent(excluded: str):
    x, y, ids = block(9, 12, 8)
    setattr(ids, f"excluded_{excluded}", None)
    same(all_of("triton", x, y, 9.0, ids), all_of("reference", x, y, 9.0, ids))


@pytest.mark.parametrize("kind", ["opposite", "half opposite", "identical"])
def test_hostile_vectors_at_scale_100(kind: str):
    x, y, ids = block(40, 37, 16)
    x = x[:1].expand(40, -1).contiguous()
    sign = {"opposite": [-1.0], "identical": [1.0], "half opposite": [1.0, -1.0]}[kind]
    y = x[:37] * torch.tensor(sign).repeat(37)[:37, None]
    got, truth = (
        all_of(impl, a, b, 100.0, ids) for impl, a, b in (("triton", x, y), ("reference", x.double(), y.double()))
    )
    same(got[:2], truth[:2], rtol=0, atol=2e-5)
    same(got[2:], truth[2:], rtol=1e-4, atol=1e-5)
    # Where the whole row or column is as far off as this, both of its exponentials have a maximum of their own.
    s, half = torch.tensor(100.0), (torch.rand(40), torch.rand(37))
    lse = [t.clamp_min(-1e30) for t in truth[:2]]

    def gradients(impl: str, *v: torch.Tensor) -> list[torch.Tensor]:
        return list(block_gradients(v[0], v[1], s, ids, half[0], v[2], half[1], v[3], impl=impl))

    want = gradients("reference", x.double(), y.double(), *lse)
    got = gradients("triton", x, y, *(t.float() for t in lse))
    same(got, want, rtol=1e-4, atol=1e-4)


def test_no_negative_at_all():
    x, y, ids = block(20, 33, 8)
    for change in (
        {"class_rows": torch.ones(20), "class_columns": torch.ones(33)},
        {"excluded_rows": torch.ones(20) > 0},
    ):
        alone = BlockIds(**{**vars(ids), **change})
        row, column, dx, dy = all_of("triton", x, y, 9.0, alone)
        assert bool((row == -torch.inf).all())
        assert bool((column == -torch.inf).all())
        assert not dx.any()
        assert not dy.any()


@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
@pytest.mark.parametrize(("R", "C"), [(0, 5), (5, 0), (0, 0)])
def test_empty_blocks(R: int, C: int, impl: str):
    x, y, ids = block(R, C, 8)
    row, column, dx, dy = all_of(impl, x, y, 9.0, ids)
    assert row.tolist() == [-torch.inf] * R
    assert column.tolist() == [-torch.inf] * C
    assert (dx.shape, dy.shape) == ((R, 8), (C, 8))
    assert not dx.any()
    assert not dy.any()


def test_bf16_in_and_fp32_out():
    x, y, ids = block(33, 40, 32)
    x, y = x.bfloat16(), y.bfloat16()
    truth = all_of("reference", x.to(F64), y.to(F64), 9.0, ids)
    for impl in ("triton", "cpu", "reference"):
        got = all_of(impl, x, y, 9.0, ids)
        assert all(t.dtype == torch.float32 for t in got)
        same(got[:2], truth[:2])  # products of bf16 numbers are exact, and so are sums but for fp32's rounding
        for a, b in zip(got[2:], truth[2:], strict=True):
            assert float((a.to(F64) - b).norm()) <= 1e-2 * float(b.norm())


def test_chunks_add_up_and_are_chosen_by_sizes_alone(monkeypatch: pytest.MonkeyPatch):
    x, y, ids = block(300, 40, 8)
    whole = all_of("triton", x, y, 9.0, ids)
    monkeypatch.setattr(flops, "CHUNK_BYTES", 1)
    assert flops.infonce_chunk(64, 4) == 128
    chunked = all_of("triton", x, y, 9.0, ids)
    same(chunked, whole, atol=1e-6)
    same(chunked, all_of("reference", x, y, 9.0, ids), atol=1e-5)
    monkeypatch.undo()
    assert flops.infonce_chunk(32768, 2) == 4096
    assert flops.infonce_chunk(2048, 2) == 65536


def test_strides_and_twice_the_same_bits():
    x, y, ids = block(33, 70, 32)
    want = all_of("triton", x, y, 20.0, ids)
    assert all(torch.equal(a, b) for a, b in zip(want, all_of("triton", x, y, 20.0, ids), strict=True))
    ring = torch.cat([x, torch.full((33, 1), torch.nan)], dim=1)[:, :-1]  # as it comes round the ring
    for view in (ring, x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2]):
        assert not view.is_contiguous()
        same(all_of("triton", view, y, 20.0, ids), want, atol=1e-6)


def test_nothing_past_the_end_is_read_or_left_unwritten(monkeypatch: pytest.MonkeyPatch):
    real = torch.empty
    x, y, ids = block(35, 37, 20)
    want = all_of("reference", x, y, 9.0, ids)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(float("nan")))
    padded = [torch.full((n + 40, 28), float("nan")) for n in (35, 37)]
    for big, small in zip(padded, (x, y), strict=True):
        big[: small.shape[0], :20] = small
    same(all_of("triton", padded[0][:35, :20], padded[1][:37, :20], 9.0, ids), want)


def test_opcheck_flops_and_orders():
    x, y, ids = block(9, 12, 8, "same_group")
    arguments = (x, y, torch.tensor(5.0), *blocks_op.mask_arguments(ids), False)
    torch.library.opcheck(blocks_op.infonce_block_lse, arguments, test_utils=FORWARD_ONLY)
    numbers = (torch.rand(9), torch.rand(9), torch.rand(12), torch.rand(12))
    more = (*arguments[:3], *numbers, *arguments[3:])
    torch.library.opcheck(blocks_op.infonce_block_grads, more, test_utils=FORWARD_ONLY)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        blocks_op.infonce_block_lse(*arguments)
        blocks_op.infonce_block_grads(*more)
    assert counter.get_total_flops() == 4 * 2 * 9 * 12 * 8
    with pytest.raises(ValueError, match=r"does not support torch.float64"):
        block_lse(x.double(), y.double(), torch.tensor(5.0), ids, impl="triton")
    with pytest.raises(ValueError, match="not available"):
        block_lse(x, y, torch.tensor(5.0), ids, impl="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no classes"):
        block_lse(x, y, torch.tensor(5.0), BlockIds("all", None, None, None, None, None))


class NothingRead(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, also inside the operators on Triton kernels."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "aten::equal")

    def __init__(self) -> None:
        super().__init__()
        ours = (blocks_op.infonce_block_lse, blocks_op.infonce_block_grads)
        self.inside = {f"comtip::{op._name}": op._init_fn for op in ours}
        self.launched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert not any(word in name for word in self.WAITS), f"{name} reads a tensor on the host"
        if name.startswith("aten::index"):
            assert not any(t is not None and t.dtype == torch.bool for t in args[1]), f"{name} by a mask"
        if name.startswith("comtip::"):
            self.launched += 1
            with self:
                return self.inside[name](*args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["gather", "ring"])
@pytest.mark.parametrize(("world", "rule"), [(2, "all"), (3, "same_group"), (2, "other_group")])
def test_ranks_on_triton_equal_the_single_operation(form: str, world: int, rule: str):
    B, extra, D = 11, 5, 16
    g = torch.Generator().manual_seed(world)
    x, y, more = (torch.randn(n, D, generator=g) for n in (B, B, extra))
    text = torch.randint(6, (B + extra,), generator=g) << 32
    section, weight = torch.randint(2, (B + extra,), generator=g), torch.rand(B, generator=g) + 0.1
    weight[::4] = 0
    counts = counts_of(B, world)
    columns = [
        torch.cat([torch.arange(B)[share_of(B, r, world)], B + torch.arange(extra)[share_of(extra, r, world)]])
        for r in range(world)
    ]
    texts = torch.cat([y, more])

    def work(rank: Rank) -> list[torch.Tensor]:
        own, mine = share_of(B, rank.rank, world), columns[rank.rank]
        leaves = [t.clone().requires_grad_() for t in (x[own], texts[mine], torch.tensor(20.0))]
        pairs = PairMetadata(text[mine], section[mine], weight[own], rule)
        with NothingRead() as mode:
            loss = global_infonce(*leaves, pairs, rank, counts, form)
            loss.backward()
        assert mode.launched == (2 if form == "gather" else 2 * world)
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    with prefer("triton"):
        found = Ranks(world).run(work)
    leaves = [t.clone().requires_grad_() for t in (x, texts, torch.tensor(20.0))]
    ids = {
        "group_rows": section[:B],
        "group_columns": section,
        "class_rows": text[:B] >> 32,
        "class_columns": text >> 32,
    }
    loss = infonce(*leaves, negatives=rule, weight_B=weight, impl="triton", **ids)
    loss.backward()
    dy = torch.zeros_like(texts)
    for mine, (_, _, part, _) in zip(columns, found, strict=True):
        dy[mine] = part
    got = [sum(f[0] for f in found), torch.cat([f[1] for f in found]), dy, sum(f[3] for f in found)]
    same(got, [loss.detach(), *(leaf.grad for leaf in leaves)], rtol=2e-5, atol=1e-6)
