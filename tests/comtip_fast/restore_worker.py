"""One of several ranks that restore engines from a whole checkpoint; used by test_checkpoint_reading.py.

``restore_worker.py FOLDER`` prints ``OK`` and the name of every engine that restores what DDP has saved, and asks for its own elements
only; and ``OK`` and what is wrong for every checkpoint that all ranks refuse.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from comtip_fast.collectives import Group
from comtip_fast.config.io import load_config
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint import tensor_file
from comtip_fast.training.checkpoint.content import Checkpoint, CheckpointError
from comtip_fast.training.checkpoint.reading import SharedReader, shared_reader
from comtip_fast.training.checkpoint.schema import load_weights
from comtip_fast.training.distributed.process_group import init_distributed
from comtip_fast.training.engines.base import Engine
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.protocol import MOMENTS, TrainingError

ENGINES = {
    "ddp": ["engine.kind=ddp"],
    **{f"zero{stage}": ["engine.kind=deepspeed", f"engine.zero_stage={stage}"] for stage in (1, 2, 3)},
}
STATE = {"step": 1}
Numbers = dict[str, Tensor]


class Asked(SharedReader):
    """A reader that counts the elements of moments that this rank asks for."""

    elements = 0

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor | None:
        self.elements += max(0, stop - start) * (key in MOMENTS)
        return super().read(name, key, start, stop)


def net(seed: int) -> nn.Module:
    """Return a network whose sizes are no multiples of the ranks, with a buffer and a frozen layer."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    module[2].bias.requires_grad_(False)
    return module


def engine_of(name: str, module: nn.Module, group: Group) -> Engine:
    return make_engine(module, load_config(None, [*ENGINES[name], "optim.clip=1.0", "train.device=cpu"]), group)


def weights_of(engine: Engine, module: nn.Module) -> Numbers:
    with engine.gathered_for_read(every_rank=True):
        return {name: value.clone() for name, value in module.state_dict().items()}


def saved(folder: Path, group: Group) -> tuple[Numbers, Numbers]:
    """Train under DDP, save on rank 0, and return weights and optimizer state."""
    module = net(seed=0)
    engine = engine_of("ddp", module, group)
    for _ in range(3):
        engine.start_step(1e-2)
        with engine.piece(True):
            loss = engine.call(lambda m, x: m(x).square().mean(), torch.randn(4, 5))
            engine.backward(loss / group.size)
        engine.update(True)
    weights, optim = weights_of(engine, module), engine.optimizer_state(every_rank=True)
    if group.rank == 0:
        checkpoints.save(folder, 1, Checkpoint(weights, optim, STATE))
        for step, values in ((2, weights), (3, optim)):
            name = next(name for name in reversed(values) if values[name].numel() > 9)
            bad = values[name].clone()
            bad.view(-1)[-1] = float("nan")
            changed = {name: bad}
            of_weights, of_optim = (weights | changed, optim) if step == 2 else (weights, optim | changed)
            checkpoints.save(folder, step, Checkpoint(of_weights, of_optim, STATE))
    return weights, optim


def same(found: Numbers, wanted: Numbers) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    tensor_file.PIECE_BYTES = 16  # four elements: the parts of a rank begin and end within pieces
    with init_distributed(200.0, "cpu") as group:
        weights, optim = saved(folder, group)
        numel = sum(t.numel() for full, t in optim.items() if not full.endswith("/step"))
        for name in ENGINES:
            module = net(seed=1)
            with shared_reader(checkpoints.open_reader, checkpoints.folder_of(folder, 1), group) as reader:
                assert isinstance(reader, SharedReader)
                asked = Asked(reader.folder, reader.content, group, reader._own)
                load_weights(module, asked)
                engine = engine_of(name, module, group)
                engine.restore(asked)
            assert same(weights_of(engine, module), weights), name
            assert same(engine.optimizer_state(every_rank=True), optim), name
            total = int(group.sum(torch.tensor(asked.elements)))
            assert total == numel * (group.size if name == "ddp" else 1), (name, total, numel)
            print(f"OK {name}", flush=True)
        for step, key in ((2, "weight of"), (3, "exp_avg_sq of")):
            message = ""
            try:
                with shared_reader(checkpoints.open_reader, checkpoints.folder_of(folder, step), group) as reader:
                    module = net(seed=1)
                    load_weights(module, reader)
                    engine_of("ddp", module, group).restore(reader)
            except CheckpointError as error:
                message = str(error)
            assert key in message, message
            assert "holds values that are not finite" in message, message
            print(f"OK {key}", flush=True)
        message, own = "", False
        try:
            with shared_reader(checkpoints.open_reader, checkpoints.folder_of(folder, 1), group) as reader:
                assert isinstance(reader, SharedReader)
                if reader._own is not None:
                    reader._own.copy = unreadable  # type: ignore[method-assign]
                load_weights(net(seed=1), reader)
        except (CheckpointError, TrainingError) as error:
            message, own = str(error), isinstance(error, CheckpointError)
        assert own == (group.rank == 0)
        assert message == ("" if group.rank == 0 else "rank 0: ") + "a file that only rank 0 reads", message
        print("OK an error of rank 0", flush=True)


def unreadable(*_: object) -> None:
    raise CheckpointError("a file that only rank 0 reads")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
