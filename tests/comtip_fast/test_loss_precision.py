"""Under bf16 autocast the losses multiply bf16 operands: over ranks and with gradient caching as in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comtip_kernels.infonce import blocks, unit
from comtip_kernels.tl_common import operand_dtype
from torch.nn import functional as F

from comtip_fast.collectives import SingleProcessGroup, counts_of, gather_rows, share_of
from comtip_fast.config.io import load_config
from comtip_fast.data.batch import Batch
from comtip_fast.objectives import PairMetadata, contrastive, global_infonce
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.task import build_task
from testkit.ranks import Rank, Ranks

SCALE = 100.0


def tensor_cores(run: Callable[..., Any], seen: list[torch.dtype]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return ``run`` on what tensor cores read of its operands: bf16, or tf32, to which they truncate fp32."""

    def emulated(x: torch.Tensor, y: torch.Tensor, *rest: Any, dtype: torch.dtype | None = None) -> Any:
        chosen = dtype or operand_dtype(x, y)
        seen.append(chosen)
        return run(*(_as_read(v, chosen) for v in (x, y)), *rest, dtype=dtype)

    return emulated


def _as_read(v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bfloat16:
        return v.to(dtype).float()
    return (v.float().contiguous().view(torch.int32) & -0x2000).view(torch.float32)


def exact_loss(image: torch.Tensor, text: torch.Tensor) -> float:
    """Return the loss of the rounded unit vectors in fp64."""
    x, y = (F.normalize(v.float(), dim=-1).bfloat16().double() for v in (image, text))
    logits = SCALE * x @ y.T
    own = logits.diagonal()
    return float((logits.logsumexp(1) + logits.logsumexp(0) - 2 * own).mean() / 2)


@pytest.mark.parametrize("form", ["gather", "ring"])
@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9, 1.0])
def test_the_loss_over_ranks_multiplies_bf16_and_has_no_bias(form: str, cosine: float, monkeypatch: pytest.MonkeyPatch):
    B, D, world, seen = 256, 512, 2, []
    monkeypatch.setattr(unit, "can_launch", lambda device: True)
    monkeypatch.setattr(contrastive, "block_lse", tensor_cores(blocks.block_lse, seen))
    monkeypatch.setattr(contrastive, "block_gradients", tensor_cores(blocks.block_gradients, seen))
    torch.set_float32_matmul_precision("high")
    g = torch.Generator().manual_seed(0)
    image, other = (F.normalize(torch.randn(B, D, generator=g), dim=-1) for _ in range(2))
    text = cosine * image + (1 - cosine**2) ** 0.5 * other
    counts = counts_of(B, world)

    def work(rank: Rank) -> tuple[torch.Tensor, torch.Tensor]:
        own = share_of(B, rank.rank, world)
        leaf = image[own].clone().requires_grad_()
        section = torch.zeros(counts[rank.rank], dtype=torch.int32)
        pairs = PairMetadata(torch.arange(B)[own], section, torch.ones(counts[rank.rank]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = global_infonce(leaf, text[own], torch.tensor(SCALE), pairs, rank, counts, form)
        loss.backward()
        return loss.detach(), leaf.grad

    try:
        found = Ranks(world).run(work)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {torch.bfloat16}
    assert sum(float(loss) for loss, _ in found) == pytest.approx(exact_loss(image, text), abs=2e-5)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for _, grad in found)


def test_with_gradient_caching_the_losses_run_in_the_precision_of_the_run(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
):
    config = load_config(None, [*tiny_overrides, "train.precision=bf16", "engine.micro_batches=2"])
    task = build_task(config, torch.device("cpu"))
    engine = make_engine(task.module, config, SingleProcessGroup())
    seen: list[torch.dtype] = []
    losses_of = task.losses_of

    def watched(batch: Batch, tensors: dict[str, torch.Tensor]) -> Any:
        seen.append(operand_dtype(tensors["vector"].float(), tensors["unit"].float()))  # fp32, as CUDA autocast gives
        return losses_of(batch, tensors)

    monkeypatch.setattr(task, "losses_of", watched)
    engine.start_step(1e-3)
    forward_backward(engine, task, task.batch(task.batches(0)[0], 1, 0), 2)
    assert seen == [torch.bfloat16]


def test_the_gradient_of_a_gathered_table_is_summed_over_ranks_in_fp32(monkeypatch: pytest.MonkeyPatch):
    """Regression test: a reduce-scatter of bf16 rounds every partial sum to bf16, so that its error grows with the number of ranks."""
    world, sent = 4, []
    scatter = Rank.scatter_rows

    def recorded(self: Rank, rows: torch.Tensor, counts: Any) -> torch.Tensor:
        sent.append(rows.dtype)
        return scatter(self, rows, counts)

    monkeypatch.setattr(Rank, "scatter_rows", recorded)
    upstream = torch.randn(world, world * 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()

    def work(rank: Rank) -> torch.Tensor:
        leaf = torch.zeros(3, 5, dtype=torch.bfloat16, requires_grad=True)
        gather_rows(leaf, rank, [3] * world).backward(upstream[rank.rank])
        return leaf.grad

    found = Ranks(world).run(work)
    assert set(sent) == {torch.float32}
    assert torch.equal(torch.cat(found), upstream.float().sum(0).bfloat16())
