"""Losses and logged numbers over ranks: any rank may lack a name, and no run waits forever."""

from __future__ import annotations

import importlib.util
import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from comtip_shards import ShardSet
from torch import Tensor

from comtip_fast.collectives import SingleProcessGroup
from comtip_fast.config.io import load_config
from comtip_fast.training.distributed.rank_numbers import RankNumbers, Reduced
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer
from testkit.distributed import run_distributed

WORKER = Path(__file__).with_name("few_spots_worker.py")


class ThreadGroup:
    """One of several ranks in threads; a collective over tensors of different shapes fails, as with gloo."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, box: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._box = rank, size, barrier, box

    def _all(self, value: Tensor) -> list[Tensor]:
        self._box[self.rank] = value
        self._barrier.wait(10)
        every = list(self._box)
        self._barrier.wait(10)
        assert len({t.shape for t in every}) == 1, "tensors of different shapes in one collective"
        return every

    def sum(self, values: Tensor) -> Tensor:
        return torch.stack(self._all(values)).sum(0)

    def max(self, values: Tensor) -> Tensor:
        return torch.stack(self._all(values)).amax(0)

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        assert list(counts) == [1] * self.size
        return torch.cat(self._all(rows))

    def scatter_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        raise NotImplementedError

    def ring_shift(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Callable[[], None]:
        raise NotImplementedError


Call = tuple[dict[str, float], dict[str, float], list[bool]]


def reduce_on_ranks(steps: list[list[Call]]) -> list[list[Reduced]]:
    """Return what every rank gets for each step; ``steps[i][rank]`` is what a rank passes."""
    size = len(steps[0])
    barrier, box = threading.Barrier(size), [None] * size
    found: list[list[Reduced]] = [[] for _ in range(size)]

    def work(rank: int) -> None:
        numbers = RankNumbers(ThreadGroup(rank, size, barrier, box), torch.device("cpu"))
        found[rank] = [numbers.reduce(*step[rank]) for step in steps]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(len(f) == len(steps) for f in found), "a rank failed or never ended"
    return [[f[i] for f in found] for i in range(len(steps))]


def test_names_that_one_rank_lacks_are_reduced_over_the_others():
    nan = math.nan
    steps = [
        [({"loss": 1.0}, {"auc": 0.5}, [False]), ({"loss": 2.0}, {}, [False]), ({"loss": 3.0}, {"auc": nan}, [True])],
        # A new name on one rank only, in the middle of the run; another one is gone everywhere.
        [({"loss": 1.0, "mfm": 4.0}, {}, [False]), ({"loss": 2.0}, {}, [False]), ({"loss": nan}, {"é": 2.0}, [False])],
        [({"loss": 1.0}, {"auc": nan}, [False]), ({"loss": 2.0}, {}, [False]), ({"loss": 3.0}, {"auc": nan}, [False])],
    ]
    first, second, third = reduce_on_ranks(steps)
    for every in (first, second, third):
        names = [(sorted(r.sums), sorted(r.means), r.flags) for r in every]
        assert names == [names[0]] * 3
    assert first[1] == Reduced({"loss": 6.0}, {"auc": 0.5}, [True])
    assert second[0].sums["mfm"] == 4.0
    assert math.isnan(second[0].sums["loss"]), "a loss that is not finite must stay visible"
    assert second[0].means == {"é": 2.0}
    assert third[1].sums == {"loss": 6.0}
    assert math.isnan(third[1].means["auc"])


def test_ranks_that_hold_different_names_from_the_start_agree():
    ((a, b),) = reduce_on_ranks([[({"x": 1.0}, {"p": 1.0}, []), ({"y": 2.0, "x": 1.0}, {"q": math.inf}, [])]])
    assert (a.sums, b.sums) == ({"x": 2.0, "y": 2.0}, {"y": 2.0, "x": 2.0})
    assert a.means["p"] == b.means["p"] == 1.0
    assert math.isnan(a.means["q"])
    assert (list(a.sums), list(b.sums)) == (["x", "y"], ["y", "x"])


def worker() -> Any:
    spec = importlib.util.spec_from_file_location("few_spots_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("engines", ["ddp", "zero"])
def test_runs_end_where_batches_have_fewer_spots_than_ranks(engines: str, tiny_shards: ShardSet, tmp_path: Path):
    if engines == "zero":
        pytest.importorskip("deepspeed")
    outputs = run_distributed([str(WORKER), str(tiny_shards.path), str(tmp_path), engines], 3, timeout_s=300, fork=True)
    runs = {r["run"]: r["rows"] for r in (json.loads(li) for li in outputs[0].splitlines() if li.startswith('{"run"'))}
    few = worker()
    assert list(runs) == list(few.RUNS[engines])
    single: dict[tuple[str, ...], list[float]] = {}
    for name, rows in runs.items():
        settings = [s for s in few.RUNS[engines][name] if not s.startswith("engine.")]
        if tuple(settings) not in single:
            config = load_config(None, [*few.COMMON, f"data.shards={tiny_shards.path}", *settings])
            task = build_task(config, torch.device("cpu"), SingleProcessGroup())
            assert min(b.size for b in task.batches(0)) == 2, "the test needs a batch smaller than three ranks"
            Trainer(task, config, tmp_path / f"single{len(single)}", SingleProcessGroup()).fit()
            lines = (tmp_path / f"single{len(single)}" / "metrics.jsonl").read_text().splitlines()
            single[tuple(settings)] = _losses([json.loads(line) for line in lines])
        assert _losses(rows) == pytest.approx(single[tuple(settings)], rel=1e-4), name
        for row in rows:
            if row["kind"] == "train":
                assert row["patch_rank"] is not None, (name, row)
                assert row["patch_variance"] is not None, (name, row)
