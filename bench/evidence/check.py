"""Comparison of an operation with its reference in fp64 on the same device, on operands that are rounded in the same way.

Every row of every output and gradient is compared. New memory is filled with NaN, to detect rows that a kernel does not write,
and a second run must give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from comtip_kernels import unit_vectors
from torch import Tensor
from torch.nn import functional as F

from bench.evidence.cases import Case, Loss, dense_infonce
from bench.evidence.timing import results


@dataclass(frozen=True)
class Precision:
    """Dtype of the inputs, and precision of their products."""

    name: str
    inputs: torch.dtype
    """Dtype of all inputs that are not scalars."""
    matmul: str = "highest"
    """Argument of ``torch.set_float32_matmul_precision``."""
    autocast: bool = False
    """Whether the operation runs under bf16 autocast, as in training."""
    tolerance: float = 2e-2
    """Maximum error of a row, due to rounding: of computed operands and outputs in bf16, of products in fp32 and tf32."""

    @property
    def products(self) -> torch.dtype:
        """Dtype of the operands of products."""
        return torch.bfloat16 if self.autocast else self.inputs

    @contextmanager
    def active(self, device: str) -> Iterator[None]:
        """Set this precision inside the block."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul)
        try:
            with torch.autocast(device, dtype=torch.bfloat16) if self.autocast else nullcontext():
                yield
        finally:
            torch.set_float32_matmul_precision(before)


PRECISIONS = (
    Precision("bf16", torch.bfloat16),
    Precision("fp32", torch.float32, tolerance=2e-4),
    Precision("tf32", torch.float32, "high", tolerance=5e-3),
    Precision("fp32 under bf16 autocast", torch.float32, "high", autocast=True),
)


@dataclass(frozen=True)
class Checked:
    """Outcome of one comparison."""

    output: int
    """Index of the output with the largest error of a row: 0 is the value, i the gradient of input i. If there are several values,
    they come first."""
    error: float
    """The largest error of a row (:func:`worst_row`); infinity if a value is not finite."""
    changed: int | None
    """Index of the first output that differs between two runs; None if all have the same bits."""
    tolerance: float
    """Maximum error that is accepted."""

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance and two runs agree."""
        return self.error <= self.tolerance and self.changed is None

    def problem(self) -> str:
        """Return what is wrong, "" if nothing is."""
        if self.error > self.tolerance:
            return f"a row of output {self.output} is off by {self.error:.3g}"
        return "" if self.changed is None else f"output {self.changed} differs between two runs"


@contextmanager
def nan_memory() -> Iterator[None]:
    """Fill tensors of ``torch.empty``, ``empty_like`` and ``new_empty`` with NaN inside the block, on any device.

    ``torch.use_deterministic_algorithms`` is not used, because it also selects other algorithms than those of training.
    """

    def filled(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Tensor:
            out = real(*args, **options)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return call

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield


def gradients(loss: Loss, inputs: list[Tensor]) -> list[Tensor]:
    """Return the values of ``loss`` and the gradients of all inputs; the gradients of the values are fixed."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = results(loss(*leaves))
    probes = [torch.linspace(0.5, 1, t.numel(), device=t.device).view(t.shape).to(t.dtype) for t in out]
    torch.autograd.backward(out, probes)
    return [t.detach() for t in (*out, *(leaf.grad for leaf in leaves))]  # type: ignore[misc, union-attr]


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

    A norm over the whole tensor would hide wrong rows: zeroing 15 of 8,192 rows changes it by only 0.1 %.
    """
    got, want = (t.double().reshape(t.shape[0] if t.ndim > 1 else 1, -1) for t in (got, want))
    if not torch.isfinite(got).all():
        return float("inf")
    norms = want.norm(dim=1)
    return float(((got - want).norm(dim=1) / torch.maximum(norms, norms.mean()).clamp_min(1e-12)).max())


def compare(case: Case, precision: Precision) -> Checked:
    """Compare every row of our outputs with the reference in fp64, and two runs with each other."""
    device = case.inputs[0].device.type
    inputs = case.cast(precision.inputs)
    with precision.active(device):
        with nan_memory():
            ours = gradients(case.ours, inputs)
        again = gradients(case.ours, inputs)
        with torch.autocast(device, enabled=False):
            want = truth(case, inputs, precision.products)
    errors = [worst_row(a, t) for a, t in zip(ours, want, strict=True)]
    changed = [i for i, (a, b) in enumerate(zip(ours, again, strict=True)) if not torch.equal(a, b)]
    worst = max(range(len(errors)), key=errors.__getitem__)
    return Checked(worst, errors[worst], changed[0] if changed else None, precision.tolerance)


def is_refusal(error: Exception) -> bool:
    """Return whether an operation raised ``error`` because its kernels do not support a size in this precision."""
    return isinstance(error, ValueError) and "supports" in str(error)


def check(case: Case, precisions: tuple[Precision, ...] = PRECISIONS) -> None:
    """Compare a case in every precision that its kernels support, and print a line if it is correct.

    Raises
    ------
    SystemExit
        The error of a row exceeds the tolerance, or two runs differ.
    """
    for precision in precisions:
        try:
            problem = compare(case, precision).problem()
        except ValueError as error:
            if not is_refusal(error):
                raise
            print(f"{case.op:<26}{case.size:<34}not checked in {precision.name}: {error}")
            continue
        if problem:
            raise SystemExit(f"{case.op} {case.size} {precision.name}: {problem}")
    print(f"{case.op:<26}{case.size:<34}correct")


def loss_bias(device: str, B: int, D: int, cosine: float, ours: Any) -> float:
    """Return our InfoNCE at scale 100 minus the fp64 loss of the same bf16 vectors; positives have the given mean cosine."""
    g = torch.Generator().manual_seed(B)
    x = F.normalize(torch.randn(B, D, generator=g), dim=-1)
    away = F.normalize(torch.randn(B, D, generator=g), dim=-1)
    y = F.normalize(cosine * x + (1 - cosine**2) ** 0.5 * away, dim=-1)
    x, y = (t.to(device, torch.bfloat16) for t in (x, y))
    unit = [t.double() for t in unit_vectors(x, y, dtype=torch.bfloat16)]
    scale = torch.tensor(100.0, device=device)
    return float(ours(x, y, scale).double() - dense_infonce(unit[0], unit[1], scale.double()))
