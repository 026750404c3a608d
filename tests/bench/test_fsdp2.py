"""bench/train/fsdp2.py: bytes are counted for every kind of collective, also of DTensors; the csv fits the code."""

from __future__ import annotations

import csv
import gc
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from comtip_shards import ShardSet
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from bench.train import fsdp2
from bench.train.traffic import Count
from comtip_fast.collectives import SingleProcessGroup
from comtip_fast.config.io import load_config
from comtip_fast.training.engines.torch import TorchEngine


@pytest.fixture
def one_rank() -> Iterator[None]:
    created = not dist.is_initialized()
    if created:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if created:
        dist.destroy_process_group()


def rows() -> dict[str, dict[str, str]]:
    with fsdp2.CSV.open(newline="") as file:
        return {row["engine"]: row for row in csv.DictReader(file)}


def test_every_kind_of_collective_is_counted(one_rank: None) -> None:
    one, other = torch.ones(6), torch.empty(6)
    # As one of two ranks, which sends half of a tensor of 24 bytes in a gather and the whole in an all-reduce.
    with Count(2) as counted:
        dist.all_reduce(one)
        dist.all_gather_into_tensor(other, one)
        dist.reduce_scatter_tensor(other, one)
    assert counted.by_kind() == {"all_reduce": 24, "all_gather": 24, "reduce_scatter": 24}
    # A DTensor calls these operators.
    name = dist.group.WORLD.group_name
    with Count(2) as counted:
        torch.ops._c10d_functional.all_reduce(one, "sum", name)
        torch.ops._c10d_functional.all_gather_into_tensor(one, 1, name)
        torch.ops._c10d_functional.reduce_scatter_tensor(one, "sum", 1, name)
    assert counted.by_kind() == {"all_reduce": 24, "all_gather": 24, "reduce_scatter": 12}
    with (
        Count(2),
        pytest.raises(NotImplementedError, match="no byte count is defined for the collective c10d::broadcast"),
    ):
        dist.broadcast(one, 0)


def test_live_bytes_count_each_storage_once_and_dtensors_by_their_local_part(
    one_rank: None, request: pytest.FixtureRequest
) -> None:
    mesh = init_device_mesh("cpu", (1,))
    gc.collect()
    gc.freeze()
    request.addfinalizer(gc.unfreeze)
    before = fsdp2.live()
    held = nn.Parameter(torch.ones(1000))
    views = [held.detach(), held.view(10, 100)]
    held.grad = torch.ones(1000)
    part = DTensor.from_local(torch.ones(500), mesh, [Partial()])
    assert fsdp2.live() - before == 4 * (1000 + 1000 + 500)
    del views, part
    assert fsdp2.live() - before == 4 * 2000
    assert fsdp2.peak_of(lambda: torch.ones(1000).add(torch.ones(1000))) == 3 * 4000


def test_the_csv_has_every_engine_and_the_lines_of_code() -> None:
    assert list(rows()) == list(fsdp2.ENGINES)
    for name, row in rows().items():
        assert abs(fsdp2.lines_of(name) / int(row["lines"]) - 1) < 0.1, f"{name}: run python bench/train/fsdp2.py again"
        assert float(row["loss_off_ddp"]) < 1e-5
        assert sum(float(row[f"{kind}_mb"]) for kind in fsdp2.KINDS) == pytest.approx(float(row["sent_mb"]), abs=0.02)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_counted_columns_of_the_csv(tiny_shards: ShardSet) -> None:
    for row in map(fsdp2.cells, fsdp2.run(str(tiny_shards.path))):
        for key in (*(f"{kind}_mb" for kind in fsdp2.KINDS), "held_mb"):
            assert float(row[key]) == pytest.approx(float(rows()[row["engine"]][key]), rel=0.02, abs=0.01), (row, key)


class Net(nn.Module):
    """Two blocks and a parameter outside of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(1))

    def transformer_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x).relu()) * self.scale


class Doubled:
    """A checkpoint whose tensors are twice those of a state dict."""

    def __init__(self, whole: dict[str, dict[str, torch.Tensor]]) -> None:
        self._whole = whole

    def read(self, name: str, key: str, start: int, stop: int) -> torch.Tensor | None:
        return 2 * self._whole[name][key].flatten()[start:stop]

    def step_of(self, name: str) -> float:
        return 9.0


def test_the_prototype_steps_as_ddp_and_restores_its_parts(one_rank: None) -> None:
    config = load_config(None, ["train.device=cpu"])
    found = []
    for make in (TorchEngine, fsdp2.Fsdp2Engine):
        engine = make(Net(), config, SingleProcessGroup())
        for _ in range(3):
            engine.start_step(1e-2)
            with engine.piece(True):
                engine.backward(engine.call(lambda m, x: m(x).square().mean(), torch.ones(2, 3)))
            norm = engine.update(True).norm
        with engine.gathered_for_read():
            weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        found.append((float(norm), weights))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert all(torch.allclose(found[0][1][name], weight) for name, weight in found[1][1].items())
    whole = {part.name: {key: t.clone() for key, t in part.tensors.items()} for part in engine.parts()}
    assert {name: t["weight"].numel() for name, t in whole.items()} == {n: p.numel() for n, p in found[0][1].items()}
    engine.restore(Doubled(whole))
    for part in engine.parts():
        assert part.step == 9
        assert part.tensors.keys() == {"weight", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(t, 2 * whole[part.name][key]) for key, t in part.tensors.items())
