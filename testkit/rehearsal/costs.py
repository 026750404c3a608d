"""Deterministic costs of a walk: FLOPs and bytes of operators, bytes stored for the backward pass, and bytes that collectives send."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from testkit.rehearsal.record import Record

KINDS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "send": "send",
    "recv": "recv",
}
"""{prefix of an operator's name without underscores: kind of the collective}; all others are ``other``."""
SENT_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "send", "other")
"""Kinds with columns in the table; a receive is not counted, because it is the counterpart of a send."""


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of the distinct elements of the tensors among ``tensors``; expanded dimensions count once."""
    total = 0
    for x in tensors:
        if isinstance(x, Tensor):
            distinct = 1
            for size, stride in zip(x.shape, x.stride(), strict=True):
                distinct *= 1 if stride == 0 and size else size
            total += distinct * x.element_size()
    return total


def moved_bytes(args: Any, kwargs: Any, out: Any) -> int:
    """Return the bytes that an operator reads and writes without any cache: every operand and every result once."""
    return tensor_bytes(tree_leaves((args, kwargs))) + tensor_bytes(tree_leaves(out))


def operator_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the FLOPs of an operator as ``torch.utils.flop_counter`` counts them; 0 for operators without products."""
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def kind_of(operator: str) -> str:
    """Return the kind of a collective's operator: ``c10d::_allgather_base_`` is ``all_gather``."""
    name = operator.partition("::")[2].strip("_")
    return next((kind for start, kind in KINDS.items() if name.startswith(start)), "other")


def by_kind(collectives: Counter[str], sent: Counter[str]) -> dict[str, str]:
    """Return the table's columns of collectives: per kind, their number, and the MB that this rank passes to them."""
    number, size = Counter[str](), Counter[str]()
    for operator, n in collectives.items():
        number[kind_of(operator)] += n
        size[kind_of(operator)] += sent[operator]
    out = {}
    for kind in SENT_KINDS:
        out |= {kind: str(number[kind]), f"{kind}_mb": f"{size[kind] / 1e6:.2f}"}
    return out


class _Saved:
    """A tensor saved by autograd; its storage is counted as live until the last saved tensor of the storage is released."""

    def __init__(self, tensor: Tensor, ledger: _Live) -> None:
        self.tensor, self.ledger, self.key = tensor, ledger, ledger.take(tensor)

    def __del__(self) -> None:
        self.ledger.release(self.key)


class _Live:
    """Storages that are currently saved; updates the maximum of their bytes in the record."""

    def __init__(self, record: Record) -> None:
        self.record, self.now = record, 0
        self.users: Counter[int] = Counter()
        self.size: dict[int, int] = {}

    def take(self, x: Tensor) -> int:
        storage = x.untyped_storage()
        key = int(storage._cdata)
        self.users[key] += 1
        if self.users[key] == 1:
            self.size[key] = storage.nbytes()
            self.now += self.size[key]
            if not self.record.paused:
                self.record.saved_bytes = max(self.record.saved_bytes, self.now)
        return key

    def release(self, key: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            self.now -= self.size.pop(key)


def _is_parameter(x: Tensor) -> bool:
    base = x if x._base is None else x._base
    return base.is_leaf and base.requires_grad


@contextmanager
def count_saved(record: Record, device: str = "cuda") -> Iterator[None]:
    """Record the maximum number of bytes on ``device`` that autograd saves for the backward pass inside the block.

    A storage counts once, whatever the number of its saved views; parameters do not count. Blocks that are recomputed
    (``engine.activation_checkpointing``) count with their inputs; the recomputed tensors are not counted.
    """
    live = _Live(record)

    def pack(x: Tensor) -> Any:
        return x if x.device.type != device or _is_parameter(x) else _Saved(x, live)

    def unpack(x: Any) -> Tensor:
        return x.tensor if isinstance(x, _Saved) else x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
