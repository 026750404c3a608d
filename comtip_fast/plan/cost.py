"""What one operation costs: FLOPs, bytes through the device's memory, bytes kept for the backward pass.

Every part of a step is a list of these (``parts.py``), so FLOPs, activations and times come from one description.
Formulas follow what PyTorch's autograd keeps; ``tests/comtip_fast/test_plan_memory.py`` and ``test_plan_flops.py``
compare them with a real step. n is a number of tokens, d a width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

INDEX = 8
"""Bytes of an int64."""
STATISTIC = 4
"""Bytes of an fp32 statistic."""


@dataclass(frozen=True)
class Cost:
    """One operation, forward and backward."""

    name: str
    flops: float = 0.0
    back_flops: float = 0.0
    moved: float = 0.0
    back_moved: float = 0.0
    saved: float = 0.0


@dataclass(frozen=True)
class Precision:
    """Bytes of an element."""

    stream: int
    """Residual stream, norms, losses."""
    operand: int
    """Operands of matrix products."""
    weight_copies: bool = False
    """Weights are kept a second time in the operands' precision (autocast)."""

    @property
    def is_bf16(self) -> bool:
        """Products run at the device's bf16 rate."""
        return self.operand == 2


FP32 = Precision(stream=4, operand=4)
AUTOCAST = Precision(stream=4, operand=2, weight_copies=True)


def total(costs: Iterable[Cost], field: str) -> float:
    """Return the sum of one field."""
    return sum(getattr(c, field) for c in costs)


def forward_only(costs: Iterable[Cost]) -> list[Cost]:
    """Return the same operations without gradients: nothing is kept, nothing runs backward."""
    return [Cost(c.name, c.flops, 0.0, c.moved) for c in costs]


def checkpointed(costs: list[Cost], kept: float, name: str) -> list[Cost]:
    """Return operations that keep only ``kept`` bytes, their input, and run forward again in the backward pass.

    They run again up to the last tensor that the backward pass wants: what comes after it does not.
    """
    last = max(i for i, c in enumerate(costs) if c.saved)
    again = [
        Cost(c.name, c.flops, c.back_flops + c.flops * (i < last), c.moved, c.back_moved + c.moved * (i < last))
        for i, c in enumerate(costs)
    ]
    return [*again, Cost(name, saved=kept)]


def linear(n: float, i: int, o: int, p: Precision, *, input_grad: bool = True, keep: bool = True) -> Cost:
    """N vectors through an (i, o) matrix; ``keep`` is False where another operation keeps the input already."""
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
    """LayerNorm of n vectors: keeps its input and two statistics each."""
    e = p.stream
    return Cost("norm", 0, 0, 2 * n * d * e, 3 * n * d * e, n * d * e + 2 * n * STATISTIC)


def pointwise(n: float, d: int, e: int, *, reads: int = 1, keep: float = 1.0, name: str = "pointwise") -> Cost:
    """One result from ``reads`` operands of n x d elements of ``e`` bytes; ``keep`` of them are kept."""
    one = n * d * e
    return Cost(name, 0, 0, (reads + 1) * one, (reads + 1) * one, keep * one)


def attention(n: float, length: float, d: int, heads: int, p: Precision) -> Cost:
    """N queries, each against ``length`` keys: two products forward, five backward (the weights are made again)."""
    one, e = 2.0 * n * length * d, p.operand
    return Cost("attention", 2 * one, 5 * one, 4 * n * d * e, 8 * n * d * e, 3 * n * d * e + n * heads * STATISTIC)


def block(n: float, length: float, d: int, hidden: int, heads: int, p: Precision) -> list[Cost]:
    """One pre-norm transformer block over n tokens in sequences of ``length``: keeps 2 streams and 6 + 2 hidden/d operands."""
    return [
        norm(n, d, p),
        linear(n, d, 3 * d, p),
        attention(n, length, d, heads, p),
        linear(n, d, d, p),
        pointwise(n, d, p.stream, reads=2, keep=0, name="add"),
        *mlp(n, d, hidden, p),
    ]


def mlp(n: float, d: int, hidden: int, p: Precision) -> list[Cost]:
    """Norm, widen, GELU, narrow, add."""
    return [
        norm(n, d, p),
        linear(n, d, hidden, p),
        pointwise(n, hidden, p.operand, name="gelu"),
        linear(n, hidden, d, p),
        pointwise(n, d, p.stream, reads=2, keep=0, name="add"),
    ]
