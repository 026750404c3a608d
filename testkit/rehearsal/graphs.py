"""Rules of CUDA graphs: whether the graph of one training step would be valid for the next one, and how many graphs a run needs.

A CUDA graph stores the kernels of a step with their arguments and addresses, and a replay launches them without the host. PyTorch
(its notes on CUDA semantics, ``torch.cuda.graphs``, CUDA graph trees) therefore asks of a captured step:

- ``wait``, ``data shape``: the host does not wait for the device, which ends a capture with an error, and no shape comes from data.
- ``operators``, ``shape``: every replay launches what was recorded: the same kernels in the same order, with the same dtypes,
  shapes and strides. Control flow on the host runs once, at the capture.
- ``number``: a Python number that becomes an argument of a kernel keeps the value that it had at the capture. One that changes
  every step (a learning rate, a key of random draws) has to be a tensor that is filled before the replay.
- ``upload``: inputs have fixed addresses: a batch is copied into the buffers of the capture. One copy of one buffer is allowed per
  step, before the replay; copies inside the step would read the host memory of the capture again.
- ``storage``: what a step reads and did not make has the same address in every step. Parameters, moments, averages and the tables
  of the genes are changed in place. A tensor that the last step created and this one reads violates this.
- ``output``: tensors that a step makes are in the private memory pool of its graph, which gives them the same addresses in every
  replay, so gradients may be created anew in every step (``zero_grad(set_to_none=True)``). The next replay overwrites them: whatever is
  read later has to be copied out first. These are counted, not forbidden.
- ``graphs``: one graph per distinct set of shapes; the number over 2,000 steps of draws.

PyTorch's generator of random numbers may be used in a captured step, because its offset is a tensor; this project draws without it.
Two further steps of a walk are compared, with other spots and another panel of the same sizes (:func:`same_sizes`).
"""

from __future__ import annotations

import csv
import gc
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from comtip_fast.training.distributed.signals import Signals
from comtip_fast.training.trainer import Trainer
from testkit.rehearsal.record import OURS, ROOT, Record, code_line
from testkit.synthetic_panels import DRAWS, same_sizes, shapes_of, shapes_over_steps, table_shards

RULES = ("wait", "data shape", "operators", "shape", "number", "upload", "storage", "output", "graphs")
_SHARED = tuple(str(ROOT / part) for part in ("comtip_fast/runtime", "kernels/comtip_kernels/tl_common.py"))
"""Code that many others call: the draw is named, not its generator, and the operation, not the function that launches."""
_PLAIN = (str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_SETUP = 0
"""Number of the step that created what existed before the first recorded one."""


@dataclass(frozen=True)
class Finding:
    """One line of ``bench/graph_rules.csv``."""

    rule: str
    """One of :data:`RULES`."""
    where: str
    """File and function, without the line, which unrelated changes move."""
    what: str
    """Operator or kernel."""
    count: int = 1

    @property
    def key(self) -> tuple[str, str, str]:
        """Everything but the count."""
        return self.rule, self.where, self.what


@dataclass(frozen=True)
class Event:
    """A launch of an operator, a collective or a kernel of the project."""

    what: str
    where: str
    operands: tuple[tuple[Any, ...], ...]
    """(``tensor``, origin of its storage, dtype, shape, strides and offset), or (``number``, value), of operands and results."""

    @property
    def head(self) -> tuple[str, str]:
        """What is launched, and where."""
        return self.what, self.where


@dataclass
class _Storage:
    """A storage on the device; the reference keeps its address from being used for another one."""

    reference: StorageWeakRef
    step: int
    origin: tuple[Any, ...]
    """``created`` and its number in the step, ``input`` and its number in the batch, or ``outside`` and its address."""
    where: str


@dataclass
class Tape:
    """Records the launches of steps, with the origin of every operand; the observer of a :class:`.record.Record`."""

    step: int = _SETUP
    loading: bool = False
    """Whether the batch is being loaded, which is not part of the captured step."""
    events: list[Event] = field(default_factory=list)
    uploads: Counter[tuple[bool, str]] = field(default_factory=Counter)
    """(whether it belongs to the batch, code) of every copy from the host."""
    read_later: set[int] = field(default_factory=set)
    """Storages of another step that this one read."""
    _storages: dict[int, _Storage] = field(default_factory=dict)
    _serial: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def recorded(self, step: int) -> Iterator[list[Event]]:
        """Record one step, and yield its events."""
        self.step, self.events, self.read_later = step, [], set()
        self._serial.clear()
        self.uploads.clear()
        yield self.events

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Tensors created inside the block are inputs of the step."""
        self.loading = True
        try:
            yield
        finally:
            self.loading = False

    def operator(self, name: str, args: Any, out: Any, *, launches: bool = True) -> None:
        """Record an operator on the device; of one that launches nothing, only the tensors that it makes are noted."""
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if launches:
            self._add(name, [*_plain(args)], results)
            return
        # Operands first: the result of a view has the storage of its operand. ``aten::to`` is called a view and can make one.
        for x in _plain(args):
            if isinstance(x, Tensor):
                self._origin(x, created=False)
        for x in results:
            self._origin(x, created=True)

    def launch(self, kernel: str, args: Any, grid: tuple[int, ...]) -> None:
        """Record a launch of an own kernel, with its grid."""
        self._add(kernel, [*_plain(args), ("grid", *grid)], [])

    def upload(self, out: Tensor) -> None:
        """Note a copy from the host."""
        self.uploads[self.loading, source_line()] += 1
        self._origin(out, created=True)

    def kept(self, step: int) -> Counter[str]:
        """Return the number of tensors of an earlier step that still exist, by code; those that this step read are left out."""
        gc.collect()  # autograd's graph has cycles
        found = (
            s
            for key, s in self._storages.items()
            if s.step == step and s.origin[0] == "created" and key not in self.read_later and not s.reference.expired()
        )
        return Counter(s.where for s in found)

    def _add(self, what: str, operands: list[Any], results: list[Tensor]) -> None:
        if self.step == _SETUP:
            return
        forms = [self._form(x, created=False) if isinstance(x, Tensor) else x for x in operands]
        forms += [self._form(x, created=True) for x in results]
        if not self.loading:
            self.events.append(Event(what, source_line(), tuple(forms)))

    def _form(self, x: Tensor, *, created: bool) -> tuple[Any, ...]:
        form = (str(x.dtype).removeprefix("torch."), tuple(x.shape), tuple(x.stride()), x.storage_offset())
        return ("tensor", self._origin(x, created=created), *form)

    def _origin(self, x: Tensor, *, created: bool) -> tuple[Any, ...]:
        reference = StorageWeakRef(x.untyped_storage())
        known = self._storages.get(reference.cdata)
        if known is None:
            kind = "outside" if not created or self.step == _SETUP else "input" if self.loading else "created"
            number = reference.cdata if kind == "outside" else self._serial[kind]
            self._serial[kind] += 1
            step = _SETUP if kind == "outside" else self.step
            known = self._storages[reference.cdata] = _Storage(reference, step, (kind, number), source_line())
        if known.step not in (_SETUP, self.step):
            self.read_later.add(reference.cdata)
            return "earlier", known.where
        return known.origin


def source_line() -> str:
    """Return the file and function that a launch belongs to, without its line and outside of :data:`_SHARED`."""
    frame, inner = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            found = f"{name.removeprefix(f'{ROOT}/')} {frame.f_code.co_name}"
            if not name.startswith(_SHARED):
                return found
            inner = inner or found
        frame = frame.f_back
    return inner or plain_place(code_line())


def _plain(args: Any) -> Iterator[Any]:
    """Yield tensors on the device as they are, and other operands as ``(kind, value)``; scalars on the CPU are numbers."""
    for x in tree_leaves(args):
        if isinstance(x, (bool, int, float, complex)):
            yield "number", repr(x)
        elif not isinstance(x, Tensor):
            # Process groups and reductions are objects whose text has an address.
            yield "option", repr(x) if isinstance(x, _PLAIN) else type(x).__name__
        elif x.device.type == "cpu":
            yield ("number", repr(x.item())) if x.ndim == 0 else ("host tensor", tuple(x.shape))
        else:
            yield x


def differences(first: list[Event], second: list[Event]) -> Iterator[Finding]:
    """Yield where the second of two steps launches what a graph of the first would not.

    Launches are paired by code and operator, in their order, so that one that is missing does not move all others.
    """
    groups: tuple[dict[Any, list[Event]], dict[Any, list[Event]]] = ({}, {})
    for events, group in zip((first, second), groups, strict=True):
        for event in events:
            group.setdefault(event.head, []).append(event)
    same = [e.head for e in first] == [e.head for e in second]
    for what, where in sorted(groups[0].keys() | groups[1].keys()):
        a, b = (group.get((what, where), []) for group in groups)
        if len(a) != len(b):
            yield Finding("operators", where, what, abs(len(a) - len(b)))
        for one, two in zip(a, b, strict=False):
            rule = _difference(one, two, same)
            if rule is not None:
                yield Finding(rule, where, what)
    if not same and all(len(groups[0].get(head, ())) == len(groups[1].get(head, ())) for head in groups[0] | groups[1]):
        what, where = next(a.head for a, b in zip(first, second, strict=True) if a.head != b.head)
        yield Finding("operators", where, f"order of {what}")


def _difference(one: Event, two: Event, same_order: bool) -> str | None:
    """Return the rule that two launches of the same code violate, None if they agree."""
    if len(one.operands) != len(two.operands):
        return "shape"
    rule = None
    for a, b in zip(one.operands, two.operands, strict=True):
        if a[0] == b[0] == "tensor":
            if a[2:] != b[2:]:
                return "shape"
            moved = b[1][0] == "earlier" or (a[1] != b[1] and (same_order or "outside" in (a[1][0], b[1][0])))
            rule = "storage" if moved else rule
        elif a != b:
            if a[0] == b[0] == "number":
                rule = rule or "number"
            else:
                return "shape"
    return rule


class GraphRules:
    """Records two steps of equal sizes one after the other, and applies the rules.

    Parameters
    ----------
    record
        Record of the stand-in CUDA on which the steps run; its waits, shapes and uploads are counted by the rules.
    """

    def __init__(self, record: Record) -> None:
        self.record, self.tape = record, Tape()
        self._steps: list[list[Event]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record the step inside the block, without its batch (:meth:`Tape.batch`)."""
        self.record.observer = self.tape
        try:
            with self.tape.recorded(len(self._steps) + 1) as events:
                yield
        finally:
            self.record.observer = None
        self._steps.append(events)

    def findings(self) -> list[Finding]:
        """Return what the rules find in the two steps, sorted by rule."""
        found = [Finding("wait", plain_place(where), what, n) for (what, where), n in self.record.waits.items()]
        found += [Finding("data shape", plain_place(w), what, n) for (what, w), n in self.record.data_shapes.items()]
        first, second = self._steps
        found += differences(first, second)
        copies = self.tape.uploads
        of_batch = sum(n for (loading, _), n in copies.items() if loading)
        found += [
            Finding("upload", where, "inside the step", n) for (loading, where), n in copies.items() if not loading
        ]
        found += [
            Finding("upload", where, "into the batch", n)
            for (loading, where), n in copies.items()
            if loading and of_batch > 1
        ]
        found += [Finding("output", where, "kept after the next step", n) for where, n in self.tape.kept(1).items()]
        return merged(found)


@contextmanager
def of_trainer(trainer: Trainer, rules: GraphRules) -> Iterator[None]:
    """Record a step of a trainer inside the block; its batch is loaded outside of the captured step."""
    task, load = trainer.task, trainer.task.batch

    def batch(*args: Any) -> Any:
        with rules.tape.batch():
            return load(*args)

    task.batch = batch  # type: ignore[method-assign]
    try:
        with rules.step():
            yield
    finally:
        task.batch = load  # type: ignore[method-assign]


def next_step(trainer: Trainer, rules: GraphRules) -> list[Finding]:
    """Take another step of the sizes of the last one, uncounted, with other spots and genes, and return the findings.

    Parameters
    ----------
    trainer
        A trainer on a synthetic loader (:class:`testkit.synthetic_task.SyntheticLoader`).
    rules
        The rules, which have recorded the step before.
    """
    task: Any = trainer.task
    shards = table_shards(trainer.config, trainer.group.size)
    host = task.step.genes.host
    shapes = shapes_of(host, trainer.config, shards)
    task.loader.panel, task.loader.first_spot = same_sizes(host, task.loader.panel, shapes), 1
    with rules.record.pause(), of_trainer(trainer, rules):
        trainer._one_step(Signals())
    graphs = Finding("graphs", "", f"over {DRAWS} steps", shapes_over_steps(trainer.config, trainer.group.size))
    return [*rules.findings(), graphs]


def plain_place(where: str) -> str:
    """Return a code line of a record without its line number."""
    return re.sub(r":\d+ ", " ", where)


def merged(found: list[Finding]) -> list[Finding]:
    """Return findings of equal keys as one, sorted by rule."""
    total: Counter[tuple[str, str, str]] = Counter()
    for one in found:
        total[one.key] += one.count
    return [Finding(*key, n) for key, n in sorted(total.items(), key=lambda item: (RULES.index(item[0][0]), item[0]))]


# -- the table ---------------------------------------------------------------------------------------------

COLUMNS = ("config", "ranks", "walk", "rule", "where", "what", "count")
Rows = dict[tuple[str, ...], int]
"""Counts by everything else in a row."""


def read_rules(path: Path) -> Rows:
    """Return the committed rows; none if there is no file."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {tuple(row[c] for c in COLUMNS[:-1]): int(row["count"]) for row in csv.DictReader(file)}


def write_rules(path: Path, rows: Rows) -> None:
    """Write the rows, sorted by walk and rule."""
    order = sorted(rows, key=lambda k: (k[0], int(k[1]), k[2], RULES.index(k[3]), k[4:]))
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        out.writerows([*key, rows[key]] for key in order)


def changed_rules(rows: Rows, before: Rows) -> tuple[list[str], list[str]]:
    """Return what is worse than in the committed rows, and what is better; ``before`` has the rows of the same walks."""
    worse, better = [], []
    for key in sorted(rows.keys() | before.keys()):
        config, ranks, walk, rule, where, what = key
        new, old = rows.get(key, 0), before.get(key, 0)
        prefix = f"{config}, ranks {ranks}, {walk}: CUDA graphs, {rule}, {where or 'panels'}"
        text = f"{prefix}: {what}, {new} times, the table has {old}"
        (worse if new > old else better if new < old else []).append(text)
    return worse, better
