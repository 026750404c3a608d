"""Every Triton operation on this machine's GPU: correct first, then timed beside what else does the same.

    python bench/kernels/gpu.py [--only infonce,packed_attention] [--out bench/gpu_results.csv]
    TRITON_INTERPRET=1 python bench/kernels/gpu.py --dry-run      # no GPU: every path once, small, no times kept

Correct: bf16 against the fp32 reference, values and gradients. Timed: forward and backward, median with 20 % and 80 % quantiles
(``triton.testing.do_bench``). Percent of roofline: the longer of FLOPs / peak and bytes / bandwidth, over the median, with this very
GPU's peak (a large bf16 product) and bandwidth (a large copy) measured in the same run; FLOPs and bytes are the ledger's.
Rows are appended, with GPU, versions and commit.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comtip_kernels import (
    gene_sentence_embedding,
    infonce,
    level_cross_entropy,
    packed_attention,
    pair_scores,
    plan_sentences,
    table_pool,
)
from comtip_kernels.infonce.blocks import BlockIds, block_gradients, block_lse
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[..., Tensor]
COLUMNS = (
    "date", "gpu", "torch", "triton", "commit", "op", "size", "provider", "ms_50", "ms_20", "ms_80", "peak_mib",
    "percent_of_roofline",
)  # fmt: skip


@dataclass
class Case:
    """One operation at one size: its inputs, ours, and what it is timed beside."""

    op: str
    size: str
    inputs: list[Tensor]
    ours: Loss
    reference: Loss
    flops: float
    bytes: float
    peers: dict[str, Loss] = field(default_factory=dict)


def infonce_case(device: str, small: bool) -> Case:
    """Return the loss over pairs and as many mispaired columns again."""
    B, M, D = (40, 60, 32) if small else (8192, 16384, 512)
    x, y, scale = _randn(device, B, D), _randn(device, M, D), torch.tensor(20.0, device=device, requires_grad=True)
    peers = {}
    if (clip := _import("open_clip.loss", "ClipLoss")) is not None:

        def open_clip(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
            return clip()(F.normalize(x, dim=-1), F.normalize(y[:B], dim=-1), s)

        peers["open_clip, pairs only"] = open_clip
    if (linear := _import("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")) is not None:

        def liger(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
            x, y, own = F.normalize(x, dim=-1), F.normalize(y, dim=-1), torch.arange(B, device=x.device)
            return (linear()(y, x * s.to(x.dtype), own) + linear()(x, y[:B] * s.to(x.dtype), own)) / 2

        peers["liger, both directions"] = liger
    return Case(
        "infonce", f"B={B} M={M} D={D}", [x, y, scale], lambda *t: infonce(*t, impl="triton"),
        lambda *t: infonce(*t, impl="reference"), 10.0 * B * M * D, 20.0 * (B + M) * D, peers,
    )  # fmt: skip


class _Block(torch.autograd.Function):
    """Mean log-sum-exp over negatives of a block's rows and columns, on the two functions that a rank calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, ids: BlockIds) -> Tensor:
        lse = block_lse(x, y, scale, ids, impl="triton")
        ctx.save_for_backward(x, y, scale, *lse)
        ctx.ids = ids
        return lse[0].mean() + lse[1].mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, *lse = ctx.saved_tensors
        half = [torch.full_like(t, 1 / t.numel()) for t in lse]
        dx, dy = block_gradients(x, y, scale, ctx.ids, half[0], lse[0], half[1], lse[1], impl="triton")
        factor = scale * grads[0]
        return (dx * factor).to(x.dtype), (dy * factor).to(y.dtype), (x.float() * dx).sum() * grads[0], None


def block_case(device: str, small: bool) -> Case:
    """Return one rank's block of the loss over many: all images against its own texts."""
    R, C, D = (40, 24, 32) if small else (65536, 2048, 512)
    x, y, scale = _randn(device, R, D), _randn(device, C, D), torch.tensor(20.0, device=device, requires_grad=True)
    rows, columns = (torch.arange(n, device=device) // 2 << 32 for n in (R, C))
    ids = BlockIds("all", None, None, rows, columns, None)

    def dense(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        logits = s.to(x.dtype) * (F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T)
        logits = logits.masked_fill(rows[:, None] == columns, -torch.inf)
        return logits.logsumexp(1).mean() + logits.logsumexp(0).mean()

    return Case(
        "infonce_block", f"R={R} C={C} D={D}", [x, y, scale],
        lambda x, y, s: _Block.apply(F.normalize(x, dim=-1), F.normalize(y, dim=-1), s, ids), dense, 10.0 * R * C * D,
        20.0 * (R + C) * D,
    )  # fmt: skip


def embedding_case(device: str, small: bool) -> Case:
    """Return the sentences of a panel at every level."""
    G, Q, D, T, V = (6, 3, 32, 6, 20) if small else (2048, 32, 512, 18, 4099)
    g = torch.Generator().manual_seed(0)
    ids, length = torch.randint(1, V, (G, T), generator=g), torch.randint(3, T + 1, (G,), generator=g)
    ids[:, 0] = 0
    ids, length = ids.repeat_interleave(Q, 0).to(device), length.repeat_interleave(Q).to(device)
    level = torch.arange(Q).repeat(G).to(device)
    plan = plan_sentences(ids, length, level)
    tables = [_randn(device, n, D) for n in (V, 3, T, Q)]
    gain, bias = _randn(device, D), _randn(device, D)
    S, U = plan.row_S.shape[0], plan.kind_U.shape[0]

    def call(impl: str) -> Loss:
        def run(token: Tensor, kinds: Tensor, position: Tensor, levels: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
            tables = (token, kinds, position, levels)
            return gene_sentence_embedding(ids, length, level, *tables, gain_D=gain, bias_D=bias, plan=plan, impl=impl)  # type: ignore[arg-type]

        return run

    return Case(
        "gene_sentence_embedding", f"S={S} U={U} D={D}", [*tables, gain, bias], call("triton"), call("reference"), 0.0,
        4.0 * S * D + 24.0 * U * D,
    )  # fmt: skip


def attention_case(device: str, small: bool, longest: int) -> Case:
    """Return sentences of 3 to ``longest`` tokens, about 1.2 million tokens: where Triton stops being the quickest is read off."""
    N, H, E = (12, 2, 16) if small else (2_432_000 // (3 + longest), 8, 64)
    length = torch.randint(3, longest + 1, (N,), generator=torch.Generator().manual_seed(0)).to(device)
    S = int(length.sum())
    inputs = [_randn(device, S, H, E) for _ in range(3)]

    def call(impl: str) -> Loss:
        return lambda q, k, v: packed_attention(q, k, v, length, longest=longest, impl=impl)  # type: ignore[arg-type]

    peers = {}
    if not small:
        for name in ("flash", "varlen"):
            try:
                call(name)(*(t[:0] for t in inputs))
            except (ValueError, RuntimeError) as error:
                print(f"packed_attention: no {name} here ({str(error).splitlines()[0]})")
            else:
                peers[name] = call(name)
    return Case(
        "packed_attention", f"longest={longest} N={N} S={S} H={H} E={E}", inputs, call("triton"), call("sdpa"), 0.0,
        22.0 * S * H * E, peers,
    )  # fmt: skip


def table_cases(device: str, small: bool) -> list[Case]:
    """Return pooling, L_level and pair scores over one sentence table; FLOPs are those that no kernel of products could spare."""
    B, G, Q, D = (20, 9, 5, 32) if small else (4096, 2048, 32, 512)
    g = torch.Generator().manual_seed(0)
    levels = torch.randint(Q, (B, G), generator=g).to(torch.uint8).to(device)
    mask = (torch.rand(B, G, generator=g) < 0.8).to(device)
    table, image = (F.normalize(_randn(device, *s).detach(), dim=-1).requires_grad_() for s in ((G, Q, D), (B, D)))
    scores, scale = _randn(device, G, Q), torch.tensor(20.0, device=device, requires_grad=True)
    size, product = f"B={B} G={G} Q={Q} D={D}", 2.0 * B * G * Q * D
    moved = 2.0 * (B + G * Q) * D

    def pool(impl: str) -> Loss:
        return lambda t, s: table_pool(t, s, levels, mask, impl=impl)  # type: ignore[arg-type]

    def loss(impl: str) -> Loss:
        return lambda x, t, s: level_cross_entropy(x, t, levels, mask, s, impl=impl)  # type: ignore[arg-type]

    def pair(impl: str) -> Loss:
        return lambda x, t: pair_scores(x, t, levels, impl=impl)  # type: ignore[arg-type]

    return [
        Case("table_pool", size, [table, scores], pool("triton"), pool("reference"), 3 * product, 5 * moved),
        Case("level_cross_entropy", size, [image, table, scale], loss("triton"), loss("reference"), 4 * product, 5 * moved),
        Case("pair_scores", size, [image, table], pair("triton"), pair("reference"), 3 * product, 5 * moved),
    ]  # fmt: skip


def _randn(device: str, *shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return x.to(device, torch.bfloat16).requires_grad_()


def _import(module: str, name: str) -> Callable[..., Callable[..., Tensor]] | None:
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except ImportError:
        print(f"no {module.split('.')[0]} here: not among the peers")
        return None


def gradients(loss: Loss, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the value and every gradient, fp32, of inputs in ``dtype``; an output that is no scalar gets a fixed gradient."""
    leaves = [t.detach().to(t.dtype if t.ndim == 0 else dtype).requires_grad_() for t in inputs]
    out = loss(*leaves)
    out.backward(torch.linspace(0.5, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype))
    return [t.detach().float() for t in (out, *(leaf.grad for leaf in leaves))]  # type: ignore[union-attr]


def check(case: Case) -> None:
    """Compare ours in bf16 with the reference in fp32, and with what torch's own bf16 makes of it.

    Raises
    ------
    SystemExit
        Where ours is more than twice as far off as torch, and by more than 2 %.
    """
    truth = gradients(case.reference, case.inputs, torch.float32)
    ours, theirs = (gradients(f, case.inputs, torch.bfloat16) for f in (case.ours, case.reference))
    for i, (a, b, t) in enumerate(zip(ours, theirs, truth, strict=True)):
        error, other, size = float((a - t).norm()), float((b - t).norm()), float(t.norm()) + 1e-9
        if not error <= 2 * other + 0.02 * size:
            raise SystemExit(
                f"{case.op} {case.size}: output {i} is off by {error / size:.3g}, torch's by {other / size:.3g}"
            )
    print(f"{case.op:<26}{case.size:<34}correct")


def timed(case: Case, loss: Loss, dry: bool) -> tuple[float, float, float, float]:
    """Return median, 20 % and 80 % quantiles in ms of forward and backward, and the extra peak memory in MiB."""
    out = loss(*case.inputs)
    upstream = torch.ones_like(out)

    def call() -> None:
        for t in case.inputs:
            t.grad = None
        loss(*case.inputs).backward(upstream)

    if dry:
        began = time.perf_counter()
        call()
        return ((time.perf_counter() - began) * 1e3, 0.0, 0.0, 0.0)
    from triton.testing import do_bench

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return (*do_bench(call, quantiles=[0.5, 0.2, 0.8]), peak)


def measured_peaks() -> tuple[float, float]:
    """Return this GPU's bf16 FLOP/s and bytes/s, from one large product and one large copy."""
    from triton.testing import do_bench

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    flops = 2 * 8192**3 / (do_bench(lambda: a @ a, quantiles=[0.5]) * 1e-3)
    x = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    return flops, 2 * 2**30 / (do_bench(lambda: y.copy_(x), quantiles=[0.5]) * 1e-3)


def about() -> dict[str, str]:
    """Return what every row says of the machine."""
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"date": date, "gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "commit": commit.stdout.strip()}  # fmt: skip


def append(path: Path, rows: list[dict[str, str]]) -> None:
    """Append rows to the table of results, which gets its header with the first."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            out.writeheader()
        out.writerows(rows)


def main() -> None:
    """Check, time, print and append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="operations, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("bench/gpu_results.csv"))
    parser.add_argument("--dry-run", action="store_true", help="small, on any machine, nothing is written")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("no GPU: PyTorch sees no CUDA device. TRITON_INTERPRET=1 ... --dry-run tries every path without one")
    device = "cpu" if args.dry_run else "cuda"
    small = args.dry_run
    made = (
        infonce_case(device, small), block_case(device, small), embedding_case(device, small),
        *(attention_case(device, small, longest) for longest in ((16,) if small else (10, 16, 24, 32, 48))),
        *table_cases(device, small),
    )  # fmt: skip
    cases = [c for c in made if not args.only or c.op in args.only.split(",")]
    for case in cases:
        check(case)
    peak_flops, bandwidth = (1.0, 1.0) if args.dry_run else measured_peaks()
    rows = []
    for case in cases:
        providers = {"ours": case.ours, "torch eager": case.reference, **case.peers}
        if not args.dry_run:
            providers["torch.compile"] = torch.compile(case.reference)
        for name, loss in providers.items():
            try:
                middle, low, high, memory = timed(case, loss, args.dry_run)
            except RuntimeError as error:  # out of memory, or a size that a peer does not take: the others go on
                if name == "ours":
                    raise
                print(f"{case.op:<26}{name:<24}failed: {str(error).splitlines()[0]}")
                continue
            share = 100 * max(case.flops / peak_flops, case.bytes / bandwidth) / (middle * 1e-3)
            reported = (
                "ran"
                if args.dry_run
                else f"{middle:>9.3f} ms ({low:.3f} to {high:.3f}) {memory:>9.0f} MiB {share:>6.1f} % of roofline"
            )
            print(f"{case.op:<26}{name:<24}{reported}")
            rows.append(about() | {
                "op": case.op, "size": case.size, "provider": name, "ms_50": f"{middle:.4f}", "ms_20": f"{low:.4f}",
                "ms_80": f"{high:.4f}", "peak_mib": f"{memory:.0f}", "percent_of_roofline": f"{share:.1f}",
            })  # fmt: skip
    if not args.dry_run:
        append(args.out, rows)


if __name__ == "__main__":
    main()
