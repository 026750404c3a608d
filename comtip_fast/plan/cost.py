"""Cost of one operation: FLOPs, memory traffic of the device, and bytes stored for the backward pass.

Every part of a step is a list of costs (``parts.py``, ``loss_parts.py``), from which FLOPs, activation memory and times are derived. The
formulas follow what PyTorch's autograd saves; ``tests/comtip_fast/test_plan_step.py`` compares them with a real step.
n is a number of tokens, d a width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

INDEX = 8
"""Size of an int64 in bytes."""
STATISTIC = 4
"""Size of an fp32 statistic in bytes."""


@dataclass(frozen=True)
class Cost:
    """Cost of one operation in the forward and the backward pass."""

    name: str
    flops: float = 0.0
    """FLOPs of the forward pass."""
    back_flops: float = 0.0
    """FLOPs of the backward pass."""
    moved: float = 0.0
    """Bytes read and written in the forward pass."""
    back_moved: float = 0.0
    """Bytes read and written in the backward pass."""
    saved: float = 0.0
    """Bytes stored for the backward pass."""
    loaded: float = 0.0
    """Bytes that a kernel of ``comtip_kernels`` loads from the L2 cache in the forward pass; 0 if they do not limit it."""
    back_loaded: float = 0.0
    """The same in the backward pass."""
    again: float = 0.0
    """Bytes that such a kernel reads from memory more than once in the forward pass, because the L2 cache is too small to keep them; not
    part of ``moved``, which counts every operand once."""
    back_again: float = 0.0
    """The same in the backward pass."""
    programs: int = 0
    """Fewest programs of such a kernel in a launch: multiprocessors without a program do not load."""

    def repeated(self, times: int) -> Cost:
        """Return the cost of the operation executed ``times`` times."""
        return Cost(
            self.name,
            times * self.flops,
            times * self.back_flops,
            times * self.moved,
            times * self.back_moved,
            times * self.saved,
            times * self.loaded,
            times * self.back_loaded,
            times * self.again,
            times * self.back_again,
            self.programs,
        )


@dataclass(frozen=True)
class Precision:
    """Bytes per element in the forward and backward pass."""

    stream: int
    """Bytes per element of the residual stream, norms and losses."""
    operand: int
    """Bytes per element of the operands of matrix products."""
    weight_copies: bool = False
    """Whether autocast keeps a copy of the weights in the operands' precision."""

    @property
    def casts(self) -> bool:
        """Whether operands of products are cast from the residual stream's precision."""
        return self.operand != self.stream

    @property
    def is_bf16(self) -> bool:
        """Whether matrix products run in bf16."""
        return self.operand == 2


FP32 = Precision(stream=4, operand=4)
AUTOCAST = Precision(stream=4, operand=2, weight_copies=True)


def total(costs: Iterable[Cost], field: str) -> float:
    """Return the sum of one field of :class:`Cost` over the operations."""
    return sum(getattr(c, field) for c in costs)


def forward_only(costs: Iterable[Cost]) -> list[Cost]:
    """Return the costs of the same operations without gradients: nothing is stored and there is no backward pass."""
    return [Cost(c.name, c.flops, moved=c.moved, loaded=c.loaded, again=c.again, programs=c.programs) for c in costs]


def checkpointed(costs: list[Cost], input_bytes: float, name: str) -> list[Cost]:
    """Return the costs of the same operations under activation checkpointing: only the input is stored.

    The backward pass recomputes the operations up to the last tensor that it needs.
    """
    last = max(i for i, c in enumerate(costs) if c.saved)
    recomputed = [
        replace(
            c,
            back_flops=c.back_flops + c.flops * (i < last),
            back_moved=c.back_moved + c.moved * (i < last),
            back_loaded=c.back_loaded + c.loaded * (i < last),
            back_again=c.back_again + c.again * (i < last),
            saved=0.0,
        )
        for i, c in enumerate(costs)
    ]
    return [*recomputed, Cost(name, saved=input_bytes)]


def linear(
    n: float,
    i: int,
    o: int,
    p: Precision,
    *,
    input_grad: bool = True,
    keep: bool = True,
    bias: bool = True,
    weights: bool = True,
) -> Cost:
    """Return the cost of an ``i`` x ``o`` linear layer on n vectors.

    Parameters
    ----------
    n, i, o, p
        Number of vectors, width of input and output, and bytes per element.
    input_grad
        Whether the input has a gradient.
    keep
        Whether the input is stored; otherwise another operation stores it.
    bias
        Whether the layer has a bias, whose gradient reads the output's gradient once more.
    weights
        Whether the weights are read here; not if these vectors are multiplied together with others.
    """
    product, e = 2.0 * n * i * o, p.operand
    own = i * o if weights else 0
    # Weights are stored in fp32 and cast, and their gradients are cast back.
    cast = own * (p.stream + e) if p.casts else 0
    products = 2 if input_grad else 1
    return Cost(
        f"linear {i}x{o}",
        product,
        products * product,
        (n * (i + o) + own) * e + cast,
        products * (n * (i + o) + own) * e + bias * n * o * e + cast,
        n * i * e if keep else 0.0,
    )


def norm(n: float, d: int, p: Precision) -> Cost:
    """Return the cost of LayerNorm on n vectors, which stores its input and two statistics per vector."""
    e = p.stream
    return Cost("norm", 0, 0, 2 * n * d * e, 3 * n * d * e, n * d * e + 2 * n * STATISTIC)


def cast(n: float, d: int, p: Precision, *, backward_only: bool = False) -> Cost:
    """Return the cost of the cast of n x d elements of the residual stream to operands of a product, and of its gradient back.

    With ``backward_only``, only a gradient is cast, because a sum in the stream's precision takes the operand as it is.
    """
    size = n * d * (p.stream + p.operand) if p.casts else 0.0
    return Cost("cast", moved=0.0 if backward_only else size, back_moved=size)


def residual(n: float, d: int, p: Precision) -> list[Cost]:
    """Return the costs of adding n x d operands to the residual stream; its backward pass adds the gradients of both uses of the stream."""
    moved = n * d * (2 * p.stream + p.operand)
    return [Cost("add", moved=moved, back_moved=3 * n * d * p.stream), cast(n, d, p, backward_only=True)]


def pointwise(n: float, d: int, e: int, *, reads: int = 1, keep: float = 1.0, name: str = "pointwise") -> Cost:
    """Return the cost of an elementwise operation on ``reads`` operands, each with n x d elements of ``e`` bytes.

    ``keep`` is the number of tensors of this size that are stored for the backward pass.
    """
    tensor = n * d * e
    return Cost(name, 0, 0, (reads + 1) * tensor, (reads + 1 + (keep > 0)) * tensor, keep * tensor)


def attention(n: float, length: float, d: int, heads: int, p: Precision) -> Cost:
    """Return the cost of n queries that attend to ``length`` keys each.

    There are two matrix products forward and five backward, since the attention weights are recomputed.
    """
    product, e = 2.0 * n * length * d, p.operand
    saved = 3 * n * d * e + n * heads * STATISTIC
    return Cost("attention", 2 * product, 5 * product, 4 * n * d * e, 8 * n * d * e, saved)


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """How the operations of a block run."""

    compiled: bool = False
    """Whether Inductor compiles the block."""
    parts: bool = False
    """Whether rows of several parts are processed together, whose attentions are concatenated (``models/vit_blocks.py``)."""
    stacks: bool = True
    """Whether the gradients of q, k and v are stacked; the packed kernels store them as one tensor."""
    weights: bool = True
    """Whether the weights are read for these rows."""
    projects: bool = True
    """Whether the block computes q, k and v of all rows; the first block of the sentence encoder copies those of equal tokens."""


def block(
    n: float, length: float, d: int, hidden: int, heads: int, p: Precision, kind: BlockKind | None = None
) -> list[Cost]:
    """Return the costs of a pre-norm transformer block on n tokens in sequences of ``length``.

    Per token, the block stores 2 d elements of the residual stream and (6 d + 2 hidden) operands.
    """
    kind = kind or BlockKind()
    operand = n * d * p.operand
    joined = Cost("join parts", moved=2 * operand, back_moved=6 * operand) if kind.parts else None
    projection = [norm(n, d, p), cast(n, d, p), linear(n, d, 3 * d, p, weights=kind.weights)]
    costs = [
        *(projection if kind.projects else []),
        attention(n, length, d, heads, p),
        *([Cost("stack gradients", back_moved=6 * operand)] if kind.stacks else []),
        linear(n, d, d, p, weights=kind.weights),
        *([joined] if joined else []),
        *residual(n, d, p),
        *mlp(n, d, hidden, p, weights=kind.weights),
    ]
    return compiled(costs, n, d, p, kind) if kind.compiled else costs


def compiled(costs: list[Cost], n: float, d: int, p: Precision, kind: BlockKind) -> list[Cost]:
    """Return the costs of a block whose norms, casts and residual sums Inductor fuses; products and activations stay as they are.

    The bytes are those of the kernels that ``bench/train/compiled_blocks.py`` finds. Forward: a norm, a sum with a norm, and a sum,
    which computes the sum before it again. Backward: a cast, the two norms' input gradients, and their weight gradients together.
    Without a projection there is one norm less: its input and result forward, and backward its input, its gradient and the sum.
    """
    forward = 4 * p.stream + 5 * p.operand
    back = 8 * p.stream + 7 * p.operand + (p.stream + p.operand if kind.parts else p.operand)
    back += 6 * p.operand if kind.stacks else 0
    if not kind.projects:
        forward, back = forward - p.stream - p.operand, back - 3 * p.stream - p.operand
    kept = [c if c.flops or c.name == "gelu" else replace(c, moved=0.0, back_moved=0.0) for c in costs]
    return [Cost("fused norms and sums", moved=forward * n * d, back_moved=back * n * d), *kept]


def mlp(n: float, d: int, hidden: int, p: Precision, *, weights: bool = True) -> list[Cost]:
    """Return the costs of norm, MLP and residual addition."""
    return [
        norm(n, d, p),
        cast(n, d, p),
        linear(n, d, hidden, p, weights=weights),
        pointwise(n, hidden, p.operand, name="gelu"),
        linear(n, hidden, d, p, weights=weights),
        *residual(n, d, p),
    ]
