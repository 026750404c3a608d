"""Training steps on stand-in CUDA tensors, fed by the real reader, loader and views of a small shard set."""

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel is not launched through the JIT", allow_module_level=True)

from comtip_fast.config.io import load_config
from comtip_fast.training.distributed.signals import Signals
from comtip_fast.training.engines.base import set_product_precision
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.task import CoMTIPTask, build_task
from comtip_fast.training.trainer import Trainer
from testkit.rehearsal.cuda_runtime import stand_in_cuda
from testkit.rehearsal.launches import recorded_launches
from testkit.rehearsal.record import Record
from testkit.rehearsal.stand_in import CUDA


def test_real_batches_with_views_and_changing_panels(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    more = ["train.device=cuda", "train.precision=bf16", "data.loader=torch", "data.workers=0", "train.log_every=100"]
    config, record = load_config(None, [*tiny_overrides, *more, "panel.min_genes=4"]), Record()
    panels: list[int] = []
    load = CoMTIPTask.batch

    def batch(*args: object) -> object:
        loaded = load(*args)
        panels.append(loaded.panel.numel())
        assert loaded.tiles.device.type == "cuda"
        return loaded

    monkeypatch.setattr(CoMTIPTask, "batch", batch)
    variants, uploads = [], []
    with stand_in_cuda(record) as mode, recorded_launches(mode):
        with record.pause():
            set_product_precision(config, CUDA)
            task = build_task(config, CUDA)
            trainer = Trainer(task, config, tmp_path / "run", task.group)
            trainer.engine = make_engine(task.module, config, task.group)
            trainer.progress.step = 1
            trainer._one_step(Signals())
        for _ in range(4):
            before = len(record.launches), len(record.uploads)
            trainer._one_step(Signals())
            variants.append({launch.signature for launch in record.launches[before[0] :]})
            uploads.append(record.uploads[before[1] :])
        task.close()
    assert len(set(panels)) > 1, panels
    assert not record.waits, record.waits
    # The batch, its levels and the parameters of its views: one copy from pinned memory.
    assert [[(u.pinned, u.blocking) for u in step] for step in uploads] == [[(True, False)]] * 4
    assert all(step and not step - set().union(*variants[:2]) for step in variants[2:]), (
        "a variant of a late step is new"
    )
