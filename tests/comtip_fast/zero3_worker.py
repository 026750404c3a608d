"""One of several ranks that build, load and validate CoMTIP under ZeRO 3; used by test_zero3_weights.py.

``zero3_worker.py SHARDS FOLDER NAME=OVERRIDE;OVERRIDE ...`` runs every check with every model and prints ``OK CHECK NAME``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.train.parity import TINY
from bench.train.traffic import Count
from comtip_fast.collectives import Group, SingleProcessGroup
from comtip_fast.config.io import load_config
from comtip_fast.config.schema import RunConfig
from comtip_fast.training.checkpoint.content import Checkpoint
from comtip_fast.training.checkpoint.schema import load_weights
from comtip_fast.training.distributed.process_group import broadcast, init_distributed
from comtip_fast.training.engines import paged_weights as paging
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.freezing import Freezing
from comtip_fast.training.grad_cache import forward_backward
from comtip_fast.training.task import CoMTIPTask, build_task

CPU = torch.device("cpu")
ZERO3 = ["engine.kind=deepspeed", "engine.zero_stage=3", "engine.persist_elements=100", "optim.clip=1.0"]
RESIDENT_BYTES = 4096
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


@contextmanager
def most_whole() -> Iterator[list[int]]:
    """Record the largest number of bytes of divided parameters that were whole at once, without those of the operation itself."""
    most, make_space = [0], paging.PagedWeights._make_space

    def recorded(self: Any, limit: int, used: Any = ()) -> None:
        make_space(self, limit, used)
        in_use = set(used)
        whole = sum(p.tensor.untyped_storage().nbytes() for p in self._pages.values() if id(p) not in in_use)
        most[0] = max(most[0], whole)

    def adopted(self: Any, module: nn.Module, keep: Any = ()) -> None:
        # Every large parameter was divided from the beginning, also those of the teacher, which is a copy.
        large = {paging.storage_key(p) for p in module.parameters() if p.nbytes >= paging.SMALLEST_BYTES}
        assert large <= self._pages.keys(), len(large - self._pages.keys())
        adopt(self, module, keep)

    adopt, paging.PagedWeights.adopt = paging.PagedWeights.adopt, adopted  # type: ignore[method-assign]
    paging.PagedWeights._make_space = recorded  # type: ignore[method-assign]
    try:
        yield most
    finally:
        paging.PagedWeights.adopt = adopt  # type: ignore[method-assign]
        paging.PagedWeights._make_space = make_space  # type: ignore[method-assign]


def build(config: RunConfig, group: Group, folder: Path) -> None:
    """The weights of a model that is built in pieces have the bits of one that is built whole."""
    wanted, random = state_of(task_of(config, SingleProcessGroup())), torch.get_rng_state()
    with most_whole() as most:
        task = task_of(config, group)
    assert torch.equal(torch.get_rng_state(), random)
    divided = paging.paged_weights(task.module)
    assert divided is not None
    largest = max(p.nbytes for p in task.module.parameters())
    assert most[0] <= RESIDENT_BYTES + largest, most
    # Nothing but the elements of this rank is left.
    assert divided.names(task.module) == {
        n for n, p in task.module.named_parameters() if p.nbytes >= paging.SMALLEST_BYTES
    }
    assert not any(p.untyped_storage().nbytes() for p in task.module.parameters() if p.nbytes >= paging.SMALLEST_BYTES)
    Freezing(task.module, config.optim.freeze).apply(task.module, 1)
    engine = make_engine(task.module, config, group)
    assert paging.paged_weights(task.module) is None
    assert_equal(gathered(task, engine), wanted)


def resume(config: RunConfig, group: Group, folder: Path) -> None:
    """Weights of a checkpoint are loaded into a model that is built in pieces."""
    torch.manual_seed(5)
    module = task_of(config, SingleProcessGroup()).module
    wanted = {k: torch.rand_like(v) if v.is_floating_point() else v.clone() for k, v in module.state_dict().items()}
    task = task_of(config, group)
    with paging.paging(task.module):
        load_weights(task.module, Checkpoint(wanted, {}, {}), folder)
    assert_equal(gathered(task, make_engine(task.module, config, group)), wanted)


def warm(config: RunConfig, group: Group, folder: Path) -> None:
    """``train.start_from`` has the same bits as without ZeRO 3, also for genes in another order."""
    export = folder / "export"
    if group.rank == 0 and not export.exists():
        torch.manual_seed(6)
        other = load_config(None, [*TINY, *SHARDS, "genes.per_cohort=20"])
        first = task_of(other, SingleProcessGroup())
        for value in first.module.parameters():
            nn.init.normal_(value)
        first.bundle().save(export)
    broadcast(None, group)
    config = load_config(None, [*TINY, *SHARDS, *ZERO3, f"train.start_from={export}"])
    wanted = state_of(task_of(config, SingleProcessGroup()))
    task = task_of(config, group)
    assert_equal(gathered(task, make_engine(task.module, config, group)), wanted)


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
    sizes = {name: p.numel() for name, p in task.module.named_parameters()}
    engine = make_engine(task.module, config, group)
    with Count(group.size) as sent, engine.gathered_for_read(every_rank=True, wanted=task.is_validated):
        task.validation_share(lambda what: None)
    # Every rank sends its part, which is padded; small weights may be gathered already.
    read = {name: n for name, n in sizes.items() if task.is_validated(name)}
    most = sum(4 * -(-n // group.size) * (group.size - 1) for n in read.values())
    least = sum(4 * -(-n // group.size) * (group.size - 1) for n in read.values() if n > 100)
    found = sum(sent.bytes.get(kind, 0) for kind in ("_allgather_base", "allgather"))
    assert least <= found <= most, (least, found, most)
    assert sum(sizes.values()) > sum(read.values())
    left = [n for n, p in task.module.named_parameters() if p.requires_grad and p.untyped_storage().nbytes()]
    assert not left, left


CHECKS: list[Callable[[RunConfig, Group, Path], None]] = [build, resume, warm, teacher, validation]
SHARDS: list[str] = []


def main(shards: str, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    paging.SMALLEST_BYTES, paging.RESIDENT_BYTES = 256, RESIDENT_BYTES
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
