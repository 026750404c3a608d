"""Deterministic costs of a walk: FLOPs and bytes of operators, tensors saved for the backward pass, and what collectives send."""

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
"""Kind of a collective by the beginning of its operator's name without leading underscores; others are ``other``."""
SENT_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "send", "other")
"""Kinds that the table counts; a receive is the other end of a send."""


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of distinct elements of tensors; an expanded tensor counts the elements that it repeats once."""
    total = 0
    for x in tensors:
        if isinstance(x, Tensor):
            distinct = 1
            for size, stride in zip(x.shape, x.stride(), strict=True):
                distinct *= 1 if stride == 0 and size else size
            total += distinct * x.element_size()
    return total


def moved_bytes(args: Any, kwargs: Any, out: Any) -> int:
    """Return the bytes that an operator reads and writes: every operand and every result once, as if no cache held any."""
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
    """Return the columns of the table: number and MB of every kind, of what this rank gives to its collectives."""
    number, size = Counter[str](), Counter[str]()
    for operator, n in collectives.items():
        number[kind_of(operator)] += n
        size[kind_of(operator)] += sent[operator]
    out = {}
    for kind in SENT_KINDS:
        out |= {kind: str(number[kind]), f"{kind}_mb": f"{size[kind] / 1e6:.2f}"}
    return out


class _Saved:
    """A tensor that autograd saved; the bytes of its storage are counted until the last one of them is released."""

    def __init__(self, tensor: Tensor, ledger: _Live) -> None:
        self.tensor, self.ledger, self.key = tensor, ledger, ledger.take(tensor)

    def __del__(self) -> None:
        self.ledger.release(self.key)


class _Live:
    """Storages that are saved now, and the most bytes at any time."""

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
def count_saved(record: Record) -> Iterator[None]:
    """Record in ``record.saved_bytes`` the most bytes that autograd holds for the backward pass inside the block.

    A storage counts once however many views of it are saved, and parameters not at all, since they exist anyway. Blocks that
    recompute (``engine.activation_checkpointing``) save their inputs; what they compute again is not counted.
    """
    live = _Live(record)

    def pack(x: Tensor) -> Any:
        return x if x.device.type == "cpu" or _is_parameter(x) else _Saved(x, live)

    def unpack(x: Any) -> Tensor:
        return x.tensor if isinstance(x, _Saved) else x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
