"""Bytes of pointwise work that ``engine.fused_blocks`` and ``engine.compile`` save in a GPU step, counted without a GPU.

    PYTHONPATH=.:kernels:data_shards python bench/train/compiled_blocks.py            write bench/compiled_blocks.csv, print it

Pointwise work is everything but products, attention and the kernels of this package: norms, activations, residual sums, casts,
copies and bias gradients. For a step of ``configs/1gpu.yaml``, the bytes of PyTorch's operators are counted in the whole step and
in each kind of transformer block, those of the kernels into which Inductor fuses the same block (:mod:`testkit.rehearsal.fused`), and
those of a fused block, whose kernels for pointwise work (``comtip_kernels.block_pointwise``) count as such: every operand and result
once. A fused block adds the branch of the block before it; that of the last block is added outside.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from comtip_fast.training.distributed.signals import Signals
from testkit.rehearsal.costs import moved_bytes, tensor_bytes
from testkit.rehearsal.fused import FusedKernel, Traced, fused_kernels, trace
from testkit.rehearsal.record import Record
from testkit.rehearsal.walk import Walk, allocate, trainer_of

TABLE = Path(__file__).parents[1] / "compiled_blocks.csv"
COLUMNS = (
    "part",
    "calls",
    "operators",
    "pointwise_gb",
    "kernels",
    "compiled_gb",
    "ratio",
    "fused_kernels",
    "fused_gb",
    "fused_ratio",
    "torch",
)
QKV = 6
"""Index of q, k and v of equal tokens among the arguments of a block of the sentence encoder."""
OWN = {"residual_norm", "residual_norm_grads", "bias_gelu", "bias_gelu_grads"}
"""Kernels of this package that do pointwise work."""


@dataclass
class Pointwise:
    """Counts operators that are neither products nor attention; the observer of a record."""

    number: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def operator(self, name: str, given: Any, out: Any, launches: bool = True) -> None:
        """Count an operator."""
        space, _, short = name.partition("::")
        packet = getattr(getattr(torch.ops, space), short, None)
        if launches and space == "aten" and packet not in flop_registry:
            self.number[name] += 1
            self.bytes[name] += moved_bytes(*given, out)

    def launch(self, name: str, given: Any, _grid: Any) -> None:
        """Count a kernel of this package if it does pointwise work."""
        if name in OWN:
            args, options = given
            tensors = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
            self.number[name] += 1
            self.bytes[name] += tensor_bytes({id(x): x for x in tensors}.values())

    def upload(self, _out: Any) -> None:
        """Leave out an upload."""


@dataclass
class Block:
    """One kind of transformer block, called with the same sizes."""

    name: str
    calls: int
    eager: Pointwise
    traced: Traced | None
    """The block as a graph; None for a fused block."""


@contextmanager
def observed(record: Record, observer: Any) -> Iterator[None]:
    """Let an observer see the operators inside the block."""
    before, record.observer = record.observer, observer
    try:
        yield
    finally:
        record.observer = before


def count(config: str = "1gpu", *, fused: bool = False) -> tuple[Pointwise, list[Block]]:
    """Return the pointwise work of a step without compiled blocks, and its kinds of blocks."""
    record, whole, calls = Record(), Pointwise(), list[tuple[nn.Module, tuple[Any, ...]]]()
    walk = Walk(config, overrides=(f"engine.fused_blocks={fused}".lower(),))
    with tempfile.TemporaryDirectory() as folder, trainer_of(walk.load(), 1, record, Path(folder)) as trainer:
        model: Any = trainer.task.model  # type: ignore[attr-defined]
        with record.pause():
            allocate(trainer)
            hooks = [b.register_forward_pre_hook(lambda m, a: calls.append((m, a))) for b in model.transformer_blocks()]
        trainer.progress.step = 1
        with observed(record, whole):
            trainer._one_step(Signals())
        for hook in hooks:
            hook.remove()
        kinds: dict[Any, list[tuple[nn.Module, tuple[Any, ...]]]] = {}
        for block, args in calls:
            shapes = tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in args)
            kinds.setdefault((type(block), shapes), []).append((block, args))
        with record.pause():
            return whole, [_block(record, *same[0], len(same), fused=fused) for same in kinds.values()]


def _block(record: Record, block: nn.Module, args: tuple[Any, ...], calls: int, *, fused: bool) -> Block:
    """Count the operators of a block's forward and backward pass, and trace it."""
    names = [n for n, _ in block.named_parameters()]
    given = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in args]
    weights = [p.detach().requires_grad_() for p in block.parameters()]

    def call(*operands: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            own = dict(zip(names, operands[len(given) :], strict=True))
            return torch.func.functional_call(block, own, operands[: len(given)])

    eager = Pointwise()
    with observed(record, eager):
        out = call(*given, *weights)
    results = [out] if isinstance(out, Tensor) else list(out[:2])  # of a stream, its bias is a weight
    gradients = [torch.empty_like(x) for x in results]
    with observed(record, eager):
        torch.autograd.backward(results, gradients)
    first = given[0]
    kind = f"{type(block).__name__} {first.shape[0]} to {results[0].shape[0]} rows of {first.shape[1]}"
    if len(args) > QKV and args[QKV] is not None:
        kind += ", q, k and v given"
    return Block(kind, calls, eager, None if fused else trace(call, [*given, *weights]))


def fused_costs(blocks: list[Block]) -> dict[str, tuple[float, float]]:
    """Return the mean number and bytes of a fused block's pointwise work by kind; the first of several has no branch to add."""
    out: dict[str, tuple[float, float]] = {}
    for name in {b.name for b in blocks}:
        same = [b for b in blocks if b.name == name]
        calls = sum(b.calls for b in same)
        number = sum(b.calls * b.eager.number.total() for b in same)
        out[name] = number / calls, sum(b.calls * b.eager.bytes.total() for b in same) / calls
    return out


def pointwise(kernels: list[FusedKernel]) -> list[FusedKernel]:
    """Return the kernels that Inductor generates; the others are products, attention and kernels of this package."""
    return [k for k in kernels if not k.library]


def costs(block: Block, fused: list[FusedKernel]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return number and bytes of a block's pointwise operators, and of the kernels that replace them."""
    generated = pointwise(fused)
    operators = block.eager.number.total(), block.eager.bytes.total()
    return operators, (len(generated), sum(k.bytes for k in generated))


def row(
    part: str, calls: int, eager: tuple[int, int], compiled: tuple[int, int], fused: tuple[float, float]
) -> dict[str, str]:
    """Return a row of the table from (number, bytes) of operators, of Inductor's kernels, and of fused blocks."""
    return {
        "part": part,
        "calls": str(calls),
        "operators": str(eager[0]),
        "pointwise_gb": f"{eager[1] / 1e9:.2f}",
        "kernels": str(compiled[0]),
        "compiled_gb": f"{compiled[1] / 1e9:.2f}",
        "ratio": f"{compiled[1] / eager[1]:.3f}",
        "fused_kernels": f"{fused[0]:.1f}",
        "fused_gb": f"{fused[1] / 1e9:.2f}",
        "fused_ratio": f"{fused[1] / eager[1]:.3f}",
        "torch": torch.__version__.partition("+")[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", action="store_true", help="print every kernel, too")
    args = parser.parse_args()
    whole, blocks = count()
    whole_fused, fused_blocks = count(fused=True)
    by_kind = fused_costs(fused_blocks)
    number, size = whole.number.total(), whole.bytes.total()
    rows, left = [], [number, size]
    for block in blocks:
        assert block.traced is not None
        kernels = fused_kernels(block.traced)
        if args.kernels:
            print(block.name, *block.eager.bytes.most_common(), *kernels, sep="\n  ")
        eager, compiled = costs(block, kernels)
        rows.append(row(block.name, block.calls, eager, compiled, by_kind[block.name]))
        left = [x + block.calls * (after - before) for x, before, after in zip(left, eager, compiled, strict=True)]
    if args.kernels:
        for block in fused_blocks:
            print(f"{block.name}, fused", *block.eager.bytes.most_common(), sep="\n  ")
        print("step, fused", *whole_fused.bytes.most_common(), sep="\n  ")
    of_fused = whole_fused.number.total(), whole_fused.bytes.total()
    rows.append(row("step", 1, (number, size), (left[0], left[1]), of_fused))
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(TABLE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
