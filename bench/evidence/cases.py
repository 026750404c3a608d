"""Cases of every Triton operation: inputs, the reference, and other implementations to compare with."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from comtip_kernels import (
    gene_sentence_embedding,
    infonce,
    level_cross_entropy,
    one_query_attention,
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

Loss = Callable[..., Tensor | tuple[Tensor, ...]]
"""An implementation: a function of the inputs that returns one result, or several."""
Product = tuple[int, int, int]
"""m, k, n of an (m, k) times a (k, n) matrix."""


@dataclass
class Case:
    """One operation at one size."""

    op: str
    size: str
    inputs: list[Tensor]
    ours: Loss
    reference: Loss
    flops: float
    """FLOPs of the definition, forward and backward, without recomputed logits; 0 if no rate is reported."""
    bytes: float
    """Bytes that forward and backward pass must at least move; 0 for a case that is not timed."""
    peers: dict[str, Loss] = field(default_factory=dict)
    """{name: other implementation}."""
    missing: dict[str, str] = field(default_factory=dict)
    """{name: reason} of other implementations that cannot be timed here."""
    rounded: tuple[int, ...] = ()
    """Indices of inputs that the operation normalises and rounds; the fp64 reference uses the vectors as the kernels round them."""
    operands: tuple[int, ...] = ()
    """Indices of inputs that the kernels multiply without normalising them."""
    exact: Loss | None = None
    """Definition for the check, if ``reference`` would normalise the rounded vectors again."""
    products: tuple[tuple[Product, ...], tuple[Product, ...]] = ((), ())
    """Matrix products of the definition, in the forward and in the backward pass."""
    fp32_inputs: bool = False
    """Whether training passes every input in fp32 under bf16 autocast; otherwise in bf16."""
    fp32: tuple[int, ...] = ()
    """Indices of inputs that are fp32 in every precision, such as the parameters of a norm."""

    def cast(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the inputs without gradients, those that are neither scalars nor always fp32 in ``dtype``."""
        kept = [i for i, t in enumerate(self.inputs) if t.ndim == 0 or i in self.fp32]
        return [t.detach().to(t.dtype if i in kept else dtype) for i, t in enumerate(self.inputs)]


def dense_infonce(x: Tensor, y: Tensor, scale: Tensor, *, weight_B: Tensor | None = None, **masks: Any) -> Tensor:
    """Return InfoNCE of normalised vectors, (B, D) and (M, D), from stored B x M logits."""
    B, M = x.shape[0], y.shape[0]
    weight = x.new_ones(B) if weight_B is None else weight_B.to(x.dtype)
    excluded = weight == 0
    ok = allowed_pairs(B, M, **masks, device=x.device)
    ok &= ~(excluded[:, None] | torch.cat([excluded, excluded.new_zeros(M - B)])[None])
    ok |= torch.eye(B, M, dtype=torch.bool, device=x.device)
    s = (scale * x @ y.T).masked_fill(~ok, -torch.inf)
    both = s.logsumexp(1) + s[:, :B].logsumexp(0) - 2 * s.diagonal()
    return (weight * both).sum() / (2 * weight.sum())


def infonce_case(device: str, B: int, M: int, D: int) -> Case:
    """Return the loss between B images and M texts; implementations that need M = B are added only then."""
    x, y = randn(device, B, D), randn(device, M, D, seed=1)
    scale = torch.tensor(20.0, device=device, requires_grad=True)
    peers, missing = {}, {}
    if M == B:  # the same columns as ours, so that FLOPs and times are comparable
        clip = find("open_clip.loss", "ClipLoss")
        if isinstance(clip, str):
            missing["open_clip ClipLoss"] = clip
        else:
            peers["open_clip ClipLoss"] = lambda x, y, s: clip()(F.normalize(x, dim=-1), F.normalize(y, dim=-1), s)
        peers["two cross entropies"] = clip_loss
    linear = find("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
    if isinstance(linear, str):
        missing["liger, both directions"] = linear
    else:
        peers["liger, both directions"] = partial(liger_loss, linear)
    u = (B, D, M)
    return Case(
        "infonce",
        f"B={B} M={M} D={D}",
        [x, y, scale],
        lambda *t: infonce(*t, impl="triton"),
        lambda *t: infonce(*t, impl="reference"),
        6.0 * B * M * D,  # the logits, and one gradient product per side
        20.0 * (B + M) * D,
        peers,
        missing,
        rounded=(0, 1),
        exact=dense_infonce,
        products=((u,), ((B, M, D), (M, B, D))),
    )


def clip_loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Return the loss of CLIP as open_clip computes it, from both cross entropies of stored logits."""
    logits = s * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T
    own = torch.arange(x.shape[0], device=x.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def liger_loss(linear: Callable[..., Any], x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Return InfoNCE as two of Liger's fused linear cross entropies."""
    x, y, own = F.normalize(x, dim=-1), F.normalize(y, dim=-1), torch.arange(x.shape[0], device=x.device)
    return (linear()(y, x * s.to(x.dtype), own) + linear()(x, y[: x.shape[0]] * s.to(x.dtype), own)) / 2


class _Block(torch.autograd.Function):
    """Mean log-sum-exp of a block's rows plus that of its columns, over their negatives, by the two functions that a rank calls."""

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


def block_case(device: str, R: int, C: int, D: int) -> Case:
    """Return one rank's block of the loss over many ranks: R images against its own C texts."""
    x, y, scale = randn(device, R, D), randn(device, C, D), torch.tensor(20.0, device=device, requires_grad=True)
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
        products=(((R, D, C),), ((R, C, D), (C, R, D))),
    )


def embedding_case(device: str, G: int, Q: int, D: int, T: int, V: int) -> Case:
    """Return the embedding of the sentences of G genes at Q levels, of at most T tokens from a vocabulary of V, D wide."""
    g = torch.Generator().manual_seed(0)
    ids, length = torch.randint(1, V, (G, T), generator=g), torch.randint(3, T + 1, (G,), generator=g)
    ids[:, 0] = 0
    ids, length = ids.repeat_interleave(Q, 0).to(device), length.repeat_interleave(Q).to(device)
    level = torch.arange(Q).repeat(G).to(device)
    plan = plan_sentences(ids, length, level)
    tables = [randn(device, n, D) for n in (V, 3, T, Q)]
    gain, bias = randn(device, D), randn(device, D)
    S, U = plan.row_S.shape[0], plan.kind_U.shape[0]

    def call(impl: str) -> Loss:
        def run(token: Tensor, kinds: Tensor, position: Tensor, levels: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
            tables = (token, kinds, position, levels)
            return gene_sentence_embedding(ids, length, level, *tables, gain_D=gain, bias_D=bias, plan=plan, impl=impl)  # type: ignore[arg-type]

        return run

    size = f"S={S} U={U} D={D}"
    inputs, moved = [*tables, gain, bias], 4.0 * S * D + 24.0 * U * D
    return Case(
        "gene_sentence_embedding", size, inputs, call("triton"), call("reference"), 0.0, moved, fp32_inputs=True
    )


def probe(name: str, device: str, n_heads: int, head_dim: int) -> str:
    """Return why an implementation cannot run on two sentences on this device, "" if it can.

    The inputs are as long as the lengths state, because kernels would read beyond shorter ones.
    """
    length = torch.tensor([3, 5], device=device)
    q = randn(device, 8, n_heads, head_dim)
    try:
        packed_attention(q, q, q, length, longest=5, impl=name).float().sum().backward()  # type: ignore[arg-type]
    except (ValueError, RuntimeError, TypeError, ImportError) as error:
        return str(error).splitlines()[0]
    return ""


def attention_case(device: str, N: int, H: int, E: int, longest: int, peers: tuple[str, ...] = ()) -> Case:
    """Return attention over N sentences of 3 to ``longest`` tokens, with H heads of width E; ``peers`` are further implementations."""
    length = torch.randint(3, longest + 1, (N,), generator=torch.Generator().manual_seed(0)).to(device)
    S = int(length.sum())
    inputs = [randn(device, S, H, E) for _ in range(3)]

    def call(impl: str) -> Loss:
        return lambda q, k, v: packed_attention(q, k, v, length, longest=longest, impl=impl)  # type: ignore[arg-type]

    errors = {name: probe(name, device, H, E) for name in peers}
    return Case(
        "packed_attention",
        f"longest={longest} N={N} S={S} H={H} E={E}",
        inputs,
        call("triton"),
        call("sdpa"),
        0.0,
        22.0 * S * H * E,
        {name: call(name) for name, error in errors.items() if not error},
        {name: error for name, error in errors.items() if error},
        operands=(0, 1, 2),
    )


def one_query_case(device: str, N: int, H: int, D: int, longest: int) -> Case:
    """Return attention with one query per head for each of N sentences of 3 to ``longest`` tokens of width D."""
    length = torch.randint(3, longest + 1, (N,), generator=torch.Generator().manual_seed(0)).to(device)
    S = int(length.sum())

    def call(impl: str) -> Loss:
        return lambda q, x: one_query_attention(q, x, length, scale=D**-0.5, longest=longest, impl=impl)  # type: ignore[arg-type]

    size = f"longest={longest} N={N} S={S} H={H} D={D}"
    inputs, moved = [randn(device, N, H, D), randn(device, S, D)], 6.0 * S * D + 10.0 * N * H * D
    return Case("one_query_attention", size, inputs, call("triton"), call("reference"), 0.0, moved, operands=(0, 1))


def table_cases(device: str, B: int, G: int, Q: int, D: int) -> list[Case]:
    """Return pooling, L_level and pair scores over one sentence table (G, Q, D) for B spots."""
    g = torch.Generator().manual_seed(0)
    levels = torch.randint(Q, (B, G), generator=g).to(torch.uint8).to(device)
    mask = (torch.rand(B, G, generator=g) < 0.8).to(device)
    table, image = (F.normalize(randn(device, *s).detach(), dim=-1).requires_grad_() for s in ((G, Q, D), (B, D)))
    scores, scale = randn(device, G, Q), torch.tensor(20.0, device=device, requires_grad=True)
    product, moved, rows = 2.0 * B * G * Q * D, 2.0 * (B + G * Q) * D, G * Q

    def pool(impl: str) -> Loss:
        return lambda t, s: table_pool(t, s, levels, mask, impl=impl)  # type: ignore[arg-type]

    def loss(impl: str) -> Loss:
        return lambda x, t, s: level_cross_entropy(x, t, levels, mask, s, impl=impl)  # type: ignore[arg-type]

    def pair(impl: str) -> Loss:
        return lambda x, t: pair_scores(x, t, levels, impl=impl)  # type: ignore[arg-type]

    scored = (((B, D, rows),), ((B, rows, D), (rows, B, D)))
    pooled = (((B, rows, D),), ((B, D, rows), (rows, B, D)))
    kinds = (
        ("table_pool", [table, scores], pool, (0,), pooled),
        ("level_cross_entropy", [image, table, scale], loss, (0, 1), scored),
        ("pair_scores", [image, table], pair, (0, 1), scored),
    )
    return [
        Case(
            op,
            f"B={B} G={G} Q={Q} D={D}",
            inputs,
            call("triton"),
            call("reference"),
            3 * product,
            5 * moved,
            operands=operands,
            products=products,
            fp32_inputs=True,
        )
        for op, inputs, call, operands, products in kinds
    ]


def masked_cases(device: str) -> list[Case]:
    """Return small cases that are checked but not timed: odd sizes, masks, groups, classes, weights and underflow."""
    B, M, D = 137, 201, 300
    g = torch.Generator().manual_seed(0)
    group, classes = (torch.randint(n, (M,), generator=g).to(device) for n in (3, 100))
    weight = torch.rand(B, generator=g)
    weight[::3] = 0
    options: dict[str, Any] = {
        "group_rows": group[:B],
        "group_columns": group,
        "class_rows": classes[:B],
        "class_columns": classes,
    }
    options["weight_B"] = weight.to(device)
    scale = torch.tensor(100.0, device=device)
    out = []
    for rule in ("all", "same_group", "other_group"):
        masks = options | {"negatives": rule}
        x, y = randn(device, B, D), randn(device, M, D, seed=1)
        size = f"B={B} M={M} D={D} {rule}"
        out.append(
            _checked(size, [x, y, scale], partial(infonce, **masks, impl="triton"), partial(dense_infonce, **masks))
        )
    # Nearly opposite vectors, for which every sum underflows, but no gradient vanishes.
    common = randn(device, 1, D).detach()
    x, away = (common + 0.5 * randn(device, B, D, seed=seed).detach() for seed in (1, 2))
    # The gradient of the scale is not compared, because its terms cancel here.
    ours, exact = (lambda x, y, f=f: f(x, y, scale) for f in (partial(infonce, impl="triton"), dense_infonce))
    out.append(_checked(f"B={B} D={D} underflow", [x, -away], ours, exact))
    return out


def _checked(size: str, inputs: list[Tensor], ours: Loss, exact: Loss) -> Case:
    return Case("infonce", size, inputs, ours, exact, 0, 0, rounded=(0, 1), exact=exact)


def randn(device: str, *shape: int, seed: int = 0) -> Tensor:
    """Return normal random numbers in bf16, which are the same on every device and require gradients."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))
    return x.to(device, torch.bfloat16).requires_grad_()


def find(module: str, name: str) -> Callable[..., Callable[..., Tensor]] | str:
    """Return an attribute of another project's module, or the reason (text) why it cannot be imported."""
    reason = why_not(module)
    return reason or getattr(sys.modules[module], name, f"{module} has no {name}")


def why_not(module: str) -> str:
    """Return why a module cannot be imported, "" if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # other projects also raise other exceptions if something is missing
        return f"{module.split('.', maxsplit=1)[0]} cannot be imported: {error}"
    return ""
