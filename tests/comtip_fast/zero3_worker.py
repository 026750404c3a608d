"""One of several ranks that update and validate CoMTIP under ZeRO 3; used by test_zero3_weights.py.

``zero3_worker.py SHARDS FOLDER NAME=OVERRIDE;OVERRIDE ...`` runs every check with every model and prints ``OK CHECK NAME``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.train.parity import TINY
from bench.train.traffic import Count
from comtip_fast.collectives import Group
from comtip_fast.config.io import load_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.training.distributed.process_group import init_distributed
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.task import CoMTIPTask, build_task
from comtip_fast.training.update.ema import WeightAverage

CPU = torch.device("cpu")
ZERO3 = ["engine.kind=deepspeed", "engine.zero_stage=3", "engine.persist_elements=100", "optim.clip=1.0"]
State = dict[str, Tensor]


def task_of(config: RunConfig, group: Group) -> CoMTIPTask:
    """Return the task of a run; the random state that a model leaves behind belongs to what must be equal."""
    return build_task(config, CPU, group)


def state_of(task: CoMTIPTask) -> State:
    """Return a copy of all weights and buffers."""
    return {name: value.clone() for name, value in task.module.state_dict().items()}


def gathered(task: CoMTIPTask, engine: Any) -> State:
    """Return all weights and buffers under an engine."""
    with engine.gathered_for_read(every_rank=True):
        return state_of(task)


def assert_equal(found: State, wanted: State) -> None:
    """Compare two states bit for bit."""
    assert found.keys() == wanted.keys()
    different = [name for name, value in wanted.items() if not torch.equal(found[name], value)]
    assert not different, different


def teacher(config: RunConfig, group: Group, folder: Path) -> None:
    """The update of the teacher sends nothing, and has the bits of an update of whole weights."""
    task = task_of(config, group)
    engine = make_engine(task.module, config, group)
    engine.module.train()
    for step in (1, 2):
        before = gathered(task, engine)
        engine.start_step(1e-2)
        forward_backward(engine, task, task.batch(task.batches(0)[0], step, 0), 1)
        engine.update(True)
        with Count(group.size) as sent, engine.elementwise():
            task.after_step(engine.module, step)
        assert sent.total == 0, sent.bytes
        after, moved = gathered(task, engine), 0
        for name, _ in task.module.named_parameters():
            student = after[name.replace("teacher.", "vision.", 1)]
            if name.startswith("teacher."):
                assert torch.equal(after[name], before[name].lerp(student, 1 - config.vision.ema_decay)), name
                moved += not torch.equal(before[name], after[name])
        assert moved > 0 or config.vision.target == "self"


def validation(config: RunConfig, group: Group, folder: Path) -> None:
    """A validation gathers every weight that it reads once, and no other, and frees them."""
    task = task_of(config, group)
    sizes = sizes_of(task)
    engine = make_engine(task.module, config, group)
    with Count(group.size) as sent, engine.gathered_for_read(every_rank=True, wanted=task.is_validated):
        task.validation_share(lambda what: None)
    assert_gathered_once(task, sizes, sent, group)
    assert_freed(task)


def sizes_of(task: CoMTIPTask) -> dict[str, int]:
    """Return the number of elements of every parameter, before ZeRO 3 takes them."""
    return {name: p.numel() for name, p in task.module.named_parameters()}


def assert_gathered_once(task: CoMTIPTask, sizes: dict[str, int], sent: Count, group: Group) -> None:
    """Check that every weight that a validation reads was gathered once, and no other."""
    # Every rank sends its part, which is padded; small weights may be gathered already.
    read = {name: n for name, n in sizes.items() if task.is_validated(name)}
    most = sum(4 * -(-n // group.size) * (group.size - 1) for n in read.values())
    least = sum(4 * -(-n // group.size) * (group.size - 1) for n in read.values() if n > 100)
    found = sum(sent.bytes.get(kind, 0) for kind in ("_allgather_base", "allgather"))
    assert least <= found <= most, (least, found, most)
    assert sum(sizes.values()) > sum(read.values())


def assert_freed(task: CoMTIPTask) -> None:
    """Check that the task's module holds no trained weight."""
    left = [n for n, p in task.module.named_parameters() if p.requires_grad and p.untyped_storage().nbytes()]
    assert not left, left


def average(config: RunConfig, group: Group, folder: Path) -> None:
    """Averages are updated without sending; a validation reads them, and neither it nor an error in it changes the weights."""
    task = task_of(config, group)
    sizes = sizes_of(task)
    engine = make_engine(task.module, config, group)
    decay, ema = 0.3, WeightAverage(0.3)
    ema.attach(engine.own_weights())
    wanted = {name: w.double() for name, w in gathered(task, engine).items()}
    for step in (1, 2, 3):
        engine.module.train()
        engine.start_step(1e-2)
        forward_backward(engine, task, task.batch(task.batches(0)[0], step, 0), 1)
        engine.update(True)
        with Count(group.size) as sent:
            ema.update(step)
            ema.update(step + 1, torch.tensor(False))  # a step that was skipped on the device
        assert sent.total == 0, sent.bytes
        d = min(decay, (1 + step) / (10 + step))
        wanted = {name: d * wanted[name] + (1 - d) * w for name, w in gathered(task, engine).items()}
    before, own = gathered(task, engine), {name: a.clone() for name, a in ema.tensors().items()}
    trained = {name for name, p in task.module.named_parameters() if p.requires_grad}
    assert own.keys() == trained
    assert sum(a.numel() for a in own.values()) < 0.6 * sum(sizes[name] for name in trained)
    reads = {"every_rank": True, "wanted": task.is_validated, "averages": ema.tensors()}
    with Count(group.size) as sent, engine.gathered_for_read(**reads):
        task.validation_share(lambda what: None)
        found, moved = state_of(task), 0
    for name in filter(task.is_validated, trained):
        assert torch.allclose(found[name].double(), wanted[name], rtol=1e-5, atol=1e-7), name
        moved += not torch.equal(found[name], before[name])
    assert moved > len(own) / 2, moved
    assert_gathered_once(task, sizes, sent, group)
    with contextlib.suppress(KeyError), engine.gathered_for_read(**reads):
        raise KeyError
    assert_freed(task)
    assert_equal(gathered(task, engine), before)
    assert_equal(ema.tensors(), own)


CHECKS: list[Callable[[RunConfig, Group, Path], None]] = [teacher, validation, average]
SHARDS: list[str] = []


def main(shards: str, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    SHARDS[:] = [f"data.shards={shards}"]
    with init_distributed(200.0, "cpu") as group:
        for case in cases:
            name, _, more = case.partition("=")
            config = load_config(None, [*TINY, *SHARDS, *ZERO3, *(text for text in more.split(";") if text)])
            for check in CHECKS:
                check(config, group, folder)
                print(f"OK {check.__name__} {name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
