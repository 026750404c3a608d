"""Every Triton operation on this machine's GPU: checked first, then timed next to other implementations.

    python bench/kernels/gpu.py [--only infonce,packed_attention] [--out bench/gpu_results.csv]
    TRITON_INTERPRET=1 python bench/kernels/gpu.py --dry-run      # no GPU: every path once, small, no times kept

Checks: at sizes that no tile divides, with masks, in bf16 and in fp32 with and without tf32, each row of every output and gradient
is compared with the reference in fp64 on operands that are rounded in the same way; outputs start as NaN, and a second run
must give the same bits. Times: forward and backward, median with 20 % and 80 % quantiles (``triton.testing.do_bench``).
Percent of roofline: the longer of FLOPs / peak and bytes / bandwidth over the median, with the peak (a large bf16 product) and
the bandwidth (a large copy) of this GPU measured in the same run. FLOPs are those of the definition: logits that a kernel
recomputes are not counted as work. Rows are appended with GPU, versions and commit.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comtip_kernels import (
    gene_sentence_embedding,
    infonce,
    level_cross_entropy,
    operand_dtype,
    packed_attention,
    pair_scores,
    plan_sentences,
    table_pool,
    unit_vectors,
)
from comtip_kernels.infonce import allowed_pairs
from comtip_kernels.infonce.blocks import BlockIds, block_gradients, block_lse
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[..., Tensor]
COLUMNS = (
    "date",
    "gpu",
    "torch",
    "triton",
    "commit",
    "op",
    "size",
    "provider",
    "ms_50",
    "ms_20",
    "ms_80",
    "peak_mib",
    "percent_of_roofline",
)


@dataclass
class Case:
    """One operation at one size: its inputs, ours, and what it is compared with."""

    op: str
    size: str
    inputs: list[Tensor]
    ours: Loss
    reference: Loss
    flops: float
    """Of the definition, forward and backward; recomputed logits are no work."""
    bytes: float
    peers: dict[str, Loss] = field(default_factory=dict)
    rounded: tuple[int, ...] = ()
    """Inputs that the operation normalises and rounds: the reference in fp64 reads them as the kernels round them."""
    operands: tuple[int, ...] = ()
    """Inputs that the kernels multiply as they are."""
    exact: Loss | None = None
    """Definition for the check where ``reference`` would normalise the rounded vectors again."""


def dense_infonce(x: Tensor, y: Tensor, scale: Tensor, *, weight_B: Tensor | None = None, **masks: Any) -> Tensor:
    """Return InfoNCE of vectors that are not normalised again; the B x M logits are stored."""
    B, M = x.shape[0], y.shape[0]
    weight = x.new_ones(B) if weight_B is None else weight_B.to(x.dtype)
    excluded = weight == 0
    ok = allowed_pairs(B, M, **masks, device=x.device)
    ok &= ~(excluded[:, None] | torch.cat([excluded, excluded.new_zeros(M - B)])[None])
    ok |= torch.eye(B, M, dtype=torch.bool, device=x.device)
    s = (scale * x @ y.T).masked_fill(~ok, -torch.inf)
    both = s.logsumexp(1) + s[:, :B].logsumexp(0) - 2 * s.diagonal()
    return (weight * both).sum() / (2 * weight.sum())


def infonce_case(device: str, small: bool, further: bool = True) -> Case:
    """Return the loss over pairs, with as many further columns or with none; peers without further columns compute pairs only."""
    B, D = (40, 32) if small else (8192, 512)
    M = B + (B if further else 0) - (20 if small and further else 0)
    x, y, scale = (
        _randn(device, B, D),
        _randn(device, M, D, seed=1),
        torch.tensor(20.0, device=device, requires_grad=True),
    )
    peers = {}
    if not further and (clip := _import("open_clip.loss", "ClipLoss")) is not None:
        # The same columns as ours, so that FLOPs and times compare.
        peers["open_clip"] = lambda x, y, s: clip()(F.normalize(x, dim=-1), F.normalize(y, dim=-1), s)
    if (linear := _import("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")) is not None:

        def liger(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
            x, y, own = F.normalize(x, dim=-1), F.normalize(y, dim=-1), torch.arange(B, device=x.device)
            return (linear()(y, x * s.to(x.dtype), own) + linear()(x, y[:B] * s.to(x.dtype), own)) / 2

        peers["liger, both directions"] = liger
    return Case(
        "infonce",
        f"B={B} M={M} D={D}",
        [x, y, scale],
        lambda *t: infonce(*t, impl="triton"),
        lambda *t: infonce(*t, impl="reference"),
        6.0 * B * M * D,  # logits, and one product per side
        20.0 * (B + M) * D,
        peers,
        rounded=(0, 1),
        exact=dense_infonce,
    )


class _Block(torch.autograd.Function):
    """Mean log-sum-exp over negatives of a block's rows and columns, on the two functions that a rank calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, ids: BlockIds, dtype: torch.dtype) -> Tensor:
        lse = block_lse(x, y, scale, ids, dtype=dtype, impl="triton")
        ctx.save_for_backward(x, y, scale, *lse)
        ctx.ids, ctx.dtype = ids, dtype
        return lse[0].mean() + lse[1].mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, *lse = ctx.saved_tensors
        half = [torch.full_like(t, 1 / t.numel()) for t in lse]
        stats = (half[0], lse[0], half[1], lse[1])
        dx, dy = block_gradients(x, y, scale, ctx.ids, *stats, dtype=ctx.dtype, impl="triton")
        factor = scale * grads[0]
        return (dx * factor).to(x.dtype), (dy * factor).to(y.dtype), (x.float() * dx).sum() * grads[0], None, None


def block_case(device: str, small: bool) -> Case:
    """Return one rank's block of the loss over many ranks: all images against its own texts."""
    R, C, D = (40, 24, 32) if small else (65536, 2048, 512)
    x, y, scale = _randn(device, R, D), _randn(device, C, D), torch.tensor(20.0, device=device, requires_grad=True)
    rows, columns = (torch.arange(n, device=device) // 2 << 32 for n in (R, C))
    ids = BlockIds("all", None, None, rows, columns, None)

    def dense(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return unnormalised(F.normalize(x, dim=-1), F.normalize(y, dim=-1), s.to(x.dtype))

    def unnormalised(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        logits = (s * (x @ y.T)).masked_fill(rows[:, None] == columns, -torch.inf)
        return logits.logsumexp(1).mean() + logits.logsumexp(0).mean()

    return Case(
        "infonce_block",
        f"R={R} C={C} D={D}",
        [x, y, scale],
        lambda x, y, s: _Block.apply(*unit_vectors(x, y, dtype=operand_dtype(x, y)), s, ids, operand_dtype(x, y)),
        dense,
        6.0 * R * C * D,
        20.0 * (R + C) * D,
        rounded=(0, 1),
        exact=unnormalised,
    )


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
        "gene_sentence_embedding",
        f"S={S} U={U} D={D}",
        [*tables, gain, bias],
        call("triton"),
        call("reference"),
        0.0,
        4.0 * S * D + 24.0 * U * D,
    )


def probe(name: str, device: str, n_heads: int, head_dim: int) -> str:
    """Return why an implementation cannot attend to two sentences on this device; an empty string if it can.

    The inputs are as long as the lengths state: kernels would read beyond shorter ones.
    """
    length = torch.tensor([3, 5], device=device)
    q = _randn(device, 8, n_heads, head_dim)
    try:
        packed_attention(q, q, q, length, longest=5, impl=name).float().sum().backward()  # type: ignore[arg-type]
    except (ValueError, RuntimeError, TypeError, ImportError) as error:
        return str(error).splitlines()[0]
    return ""


def attention_case(device: str, small: bool, longest: int) -> Case:
    """Return sentences of 3 to ``longest`` tokens, about 1.2 million tokens: which shows up to where Triton is the fastest."""
    N, H, E = (12, 2, 16) if small else (2_432_000 // (3 + longest), 8, 64)
    length = torch.randint(3, longest + 1, (N,), generator=torch.Generator().manual_seed(0)).to(device)
    S = int(length.sum())
    inputs = [_randn(device, S, H, E) for _ in range(3)]

    def call(impl: str) -> Loss:
        return lambda q, k, v: packed_attention(q, k, v, length, longest=longest, impl=impl)  # type: ignore[arg-type]

    peers = {}
    for name in () if small else ("flash", "varlen"):
        error = probe(name, device, H, E)
        if error:
            print(f"packed_attention: {name} is not timed: {error}")
        else:
            peers[name] = call(name)
    return Case(
        "packed_attention",
        f"longest={longest} N={N} S={S} H={H} E={E}",
        inputs,
        call("triton"),
        call("sdpa"),
        0.0,
        22.0 * S * H * E,
        peers,
        operands=(0, 1, 2),
    )


def table_cases(device: str, small: bool) -> list[Case]:
    """Return pooling, L_level and pair scores over one sentence table; FLOPs are those of its products."""
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
        Case(
            "table_pool",
            size,
            [table, scores],
            pool("triton"),
            pool("reference"),
            3 * product,
            5 * moved,
            operands=(0,),
        ),
        Case(
            "level_cross_entropy",
            size,
            [image, table, scale],
            loss("triton"),
            loss("reference"),
            3 * product,
            5 * moved,
            operands=(0, 1),
        ),
        Case(
            "pair_scores",
            size,
            [image, table],
            pair("triton"),
            pair("reference"),
            3 * product,
            5 * moved,
            operands=(0, 1),
        ),
    ]


def _randn(device: str, *shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))
    return x.to(device, torch.bfloat16).requires_grad_()


def _import(module: str, name: str) -> Callable[..., Callable[..., Tensor]] | None:
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except ImportError:
        print(f"{module.split('.', maxsplit=1)[0]} is not installed and not timed")
        return None


def gradients(loss: Loss, inputs: list[Tensor]) -> list[Tensor]:
    """Return the value and every gradient; an output that is no scalar has a fixed gradient."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = loss(*leaves)
    out.backward(torch.linspace(0.5, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype))
    return [t.detach() for t in (out, *(leaf.grad for leaf in leaves))]  # type: ignore[misc, union-attr]


def truth(case: Case, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return value and gradients of the reference in fp64, on operands rounded as the kernels round them."""
    exact = [t.detach().double() for t in inputs]
    for i in case.operands:
        exact[i] = exact[i].to(dtype).double()

    def loss(*leaves: Tensor) -> Tensor:
        read = list(leaves)
        for i in case.rounded:
            rounded = unit_vectors(inputs[i].detach(), dtype=dtype)[0].double()
            unit = F.normalize(leaves[i], dim=-1)
            read[i] = unit + (rounded - unit).detach()
        return (case.exact or case.reference)(*read)

    return gradients(loss, exact)


def worst_row(got: Tensor, want: Tensor) -> float:
    """Return the largest error of a row, relative to the larger of its norm and the mean norm of all rows.

    A norm over the whole tensor would hide rows that are wrong: 15 of 8,192 zeroed change it by 0.1 %.
    """
    got, want = (t.double().reshape(t.shape[0] if t.ndim > 1 else 1, -1) for t in (got, want))
    if not torch.isfinite(got).all():
        return float("inf")
    norms = want.norm(dim=1)
    return float(((got - want).norm(dim=1) / torch.maximum(norms, norms.mean()).clamp_min(1e-12)).max())


PRECISIONS = (("bf16", torch.bfloat16, "highest"), ("fp32", torch.float32, "highest"), ("tf32", torch.float32, "high"))
TOLERANCE = {"bf16": 2e-2, "fp32": 2e-4, "tf32": 5e-3}
"""Maximum relative error of a row: bf16 rounds computed operands and outputs, fp32 and tf32 round products."""


def check(case: Case, precisions: tuple[tuple[str, torch.dtype, str], ...] = PRECISIONS) -> None:
    """Compare every row of ours with the reference in fp64, in every precision, and two runs with each other.

    Raises
    ------
    SystemExit
        If a row is off by more than the tolerance, or two runs differ.
    """
    for name, dtype, matmul in precisions:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(matmul)
        try:
            inputs = [t.detach().to(t.dtype if t.ndim == 0 else dtype) for t in case.inputs]
            ours, again = gradients(case.ours, inputs), gradients(case.ours, inputs)
            want = truth(case, inputs, dtype)
        finally:
            torch.set_float32_matmul_precision(before)
        for i, (a, b, t) in enumerate(zip(ours, again, want, strict=True)):
            error = worst_row(a, t)
            if error > TOLERANCE[name]:
                raise SystemExit(f"{case.op} {case.size} {name}: a row of output {i} is off by {error:.3g}")
            if not torch.equal(a, b):
                raise SystemExit(f"{case.op} {case.size} {name}: output {i} differs between two runs")
    print(f"{case.op:<26}{case.size:<34}correct")


def masked_cases(device: str) -> list[Case]:
    """Return small cases that are checked and not timed: odd sizes, masks, groups, classes, weights and underflow."""
    B, M, D = 137, 201, 300
    g = torch.Generator().manual_seed(0)
    group, classes = (torch.randint(n, (M,), generator=g).to(device) for n in (3, 100))
    weight = torch.rand(B, generator=g)
    weight[::3] = 0
    options = {"group_rows": group[:B], "group_columns": group, "class_rows": classes[:B], "class_columns": classes}
    options["weight_B"] = weight.to(device)
    scale = torch.tensor(100.0, device=device)
    out = []
    for rule in ("all", "same_group", "other_group"):
        masks = options | {"negatives": rule}
        x, y = _randn(device, B, D), _randn(device, M, D, seed=1)
        size = f"B={B} M={M} D={D} {rule}"
        out.append(
            _checked(size, [x, y, scale], partial(infonce, **masks, impl="triton"), partial(dense_infonce, **masks))
        )
    # Nearly opposite, so that every sum underflows and no gradient vanishes.
    common = _randn(device, 1, D).detach()
    x, away = (common + 0.5 * _randn(device, B, D, seed=seed).detach() for seed in (1, 2))
    # The gradient of the scale is a sum of terms that cancel here, and is not compared.
    ours, exact = (lambda x, y, f=f: f(x, y, scale) for f in (partial(infonce, impl="triton"), dense_infonce))
    out.append(_checked(f"B={B} D={D} underflow", [x, -away], ours, exact))
    return out


def _checked(size: str, inputs: list[Tensor], ours: Loss, exact: Loss) -> Case:
    return Case("infonce", size, inputs, ours, exact, 0, 0, rounded=(0, 1), exact=exact)


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
    """Return the columns that describe the machine."""
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {
        "date": date,
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit.stdout.strip(),
    }


def append(path: Path, rows: list[dict[str, str]]) -> None:
    """Append rows to the table of results; the first write adds the header."""
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
    parser.add_argument("--dry-run", action="store_true", help="small sizes on any machine; nothing is written")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit(
            "no GPU: PyTorch finds no CUDA device; TRITON_INTERPRET=1 python bench/kernels/gpu.py --dry-run runs every path without one"
        )
    device = "cpu" if args.dry_run else "cuda"
    small = args.dry_run
    built = (
        infonce_case(device, small),
        infonce_case(device, small, further=False),
        block_case(device, small),
        embedding_case(device, small),
        *(attention_case(device, small, longest) for longest in ((16,) if small else (10, 16, 24, 32, 48))),
        *table_cases(device, small),
    )
    cases = [c for c in built if not args.only or c.op in args.only.split(",")]
    for case in [*cases, *(c for c in masked_cases(device) if not args.only or c.op in args.only.split(","))]:
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
            except (
                RuntimeError
            ) as error:  # out of memory, or a size that a peer does not support: continue with the others
                if name == "ours":
                    raise
                print(f"{case.op:<26}{name:<24}failed: {str(error).splitlines()[0]}")
                continue
            share = 100 * max(case.flops / peak_flops, case.bytes / bandwidth) / (middle * 1e-3)
            outcome = (
                "ran"
                if args.dry_run
                else f"{middle:>9.3f} ms ({low:.3f} to {high:.3f}) {memory:>9.0f} MiB {share:>6.1f} % of roofline"
            )
            print(f"{case.op:<26}{name:<24}{outcome}")
            rows.append(
                about()
                | {
                    "op": case.op,
                    "size": case.size,
                    "provider": name,
                    "ms_50": f"{middle:.4f}",
                    "ms_20": f"{low:.4f}",
                    "ms_80": f"{high:.4f}",
                    "peak_mib": f"{memory:.0f}",
                    "percent_of_roofline": f"{share:.1f}",
                }
            )
    if not args.dry_run:
        append(args.out, rows)


if __name__ == "__main__":
    main()
