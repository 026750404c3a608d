"""Cost of one operation: FLOPs, memory traffic of the device, and bytes stored for the backward pass.

Every part of a step is a list of costs (``parts.py``), from which FLOPs, activation memory and times are derived. The
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
    programs: int = 0
    """Fewest programs of such a kernel in a launch: multiprocessors without a program do not load."""


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
    return [Cost(c.name, c.flops, 0.0, c.moved, loaded=c.loaded, programs=c.programs) for c in costs]


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
            saved=0.0,
        )
        for i, c in enumerate(costs)
    ]
    return [*recomputed, Cost(name, saved=input_bytes)]


def linear(n: float, i: int, o: int, p: Precision, *, input_grad: bool = True, keep: bool = True) -> Cost:
    """Return the cost of an ``i`` x ``o`` linear layer on n vectors; if ``keep`` is False, another operation stores its input."""
    product, e = 2.0 * n * i * o, p.operand
    return Cost(
        f"linear {i}x{o}",
        product,
        (2 if input_grad else 1) * product,
        (n * (i + o) + i * o) * e,
        (2 * n * (i + o) + 2 * i * o) * e,
        n * i * e if keep else 0.0,
    )


def norm(n: float, d: int, p: Precision) -> Cost:
    """Return the cost of LayerNorm on n vectors, which stores its input and two statistics per vector."""
    e = p.stream
    return Cost("norm", 0, 0, 2 * n * d * e, 3 * n * d * e, n * d * e + 2 * n * STATISTIC)


def pointwise(n: float, d: int, e: int, *, reads: int = 1, keep: float = 1.0, name: str = "pointwise") -> Cost:
    """Return the cost of an elementwise operation on ``reads`` operands, each with n x d elements of ``e`` bytes.

    ``keep`` is the number of tensors of this size that are stored for the backward pass.
    """
    tensor = n * d * e
    return Cost(name, 0, 0, (reads + 1) * tensor, (reads + 1) * tensor, keep * tensor)


def attention(n: float, length: float, d: int, heads: int, p: Precision) -> Cost:
    """Return the cost of n queries that attend to ``length`` keys each.

    There are two matrix products forward and five backward, since the attention weights are recomputed.
    """
    product, e = 2.0 * n * length * d, p.operand
    saved = 3 * n * d * e + n * heads * STATISTIC
    return Cost("attention", 2 * product, 5 * product, 4 * n * d * e, 8 * n * d * e, saved)


def block(n: float, length: float, d: int, hidden: int, heads: int, p: Precision) -> list[Cost]:
    """Return the costs of a pre-norm transformer block on n tokens in sequences of ``length``.

    Per token, the block stores 2 d elements of the residual stream and (6 d + 2 hidden) operands.
    """
    return [
        norm(n, d, p),
        linear(n, d, 3 * d, p),
        attention(n, length, d, heads, p),
        linear(n, d, d, p),
        pointwise(n, d, p.stream, reads=2, keep=0, name="add"),
        *mlp(n, d, hidden, p),
    ]


def mlp(n: float, d: int, hidden: int, p: Precision) -> list[Cost]:
    """Return the costs of norm, MLP and residual addition."""
    return [
        norm(n, d, p),
        linear(n, d, hidden, p),
        pointwise(n, hidden, p.operand, name="gelu"),
        linear(n, hidden, d, p),
        pointwise(n, d, p.stream, reads=2, keep=0, name="add"),
    ]
