"""Validation in chunks: bounded memory, the run's precision, a cap on spots, and the same score."""

import numpy as np
import pytest
import torch
from comtip_shards import ShardSet
from torch import Tensor

from comtip_fast.config.io import load_config
from comtip_fast.models import CoMTIP
from comtip_fast.training import validation
from comtip_fast.training.task import CoMTIPTask, build_task

CPU = torch.device("cpu")


def task_of(shards: ShardSet, overrides: list[str], *more: str) -> CoMTIPTask:
    task = build_task(load_config(None, [*overrides, f"data.shards={shards.path}", *more]), CPU)
    task.model.eval()
    return task


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of tiles of each call of the image encoder."""
    calls: list[int] = []
    real = CoMTIP.encode_image

    def recorded(self: CoMTIP, features: Tensor):
        calls.append(features.shape[0])
        return real(self, features)

    monkeypatch.setattr(CoMTIP, "encode_image", recorded)
    return calls


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("stem", [(), ("vision.stem=efficientnet_lite0",)], ids=["pixels", "stem"])
def test_a_section_is_encoded_in_chunks(
    tiny_shards: ShardSet, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, encoded, kept: int, stem
):
    """Regression test: a section was encoded in one call, and the features of every section stayed on the device."""
    task = task_of(tiny_shards, tiny_overrides, *stem)
    whole = task.validate()
    n = sum(encoded)
    assert n == sum(s.n_spots for s in tiny_shards.manifest.sections if s.split == "val")
    encoded.clear()
    monkeypatch.setattr(validation, "CHUNK", 5)
    monkeypatch.setattr(validation, "KEPT_BYTES", kept)
    read: list[int] = []
    real = task.loader.tiles
    monkeypatch.setattr(task.loader, "tiles", lambda spots, view: read.append(spots.size) or real(spots, view))
    in_chunks = validation.Validation(task.model, task.shards, task.tables, task.loader, task.genes, task.config)
    for _ in range(2):
        encoded.clear()
        score, per_cohort, space = in_chunks.score()
        assert max(encoded) <= 5
        assert sum(encoded) == n
        assert score == pytest.approx(whole[0], abs=1e-5)
        assert per_cohort == pytest.approx(whole[1], abs=1e-5)
        assert space == pytest.approx(whole[2], abs=1e-3)
    assert max(read) <= 5
    assert sum(read) == (n if kept else 2 * n)
    held = sum(inputs.nbytes for _, inputs in in_chunks._kept.values())
    assert held <= kept


def test_the_spots_of_a_section_are_capped(tiny_shards: ShardSet, tiny_overrides: list[str], encoded):
    task = task_of(tiny_shards, tiny_overrides, "train.validate_spots=7")
    score, _, _ = task.validate()
    assert np.isfinite(score)
    assert encoded == [7] * sum(s.split == "val" for s in tiny_shards.manifest.sections)
    assert validation.evenly(100, 7).tolist() == [0, 16, 33, 50, 66, 82, 99]
    assert validation.evenly(3, 7).tolist() == [0, 1, 2]
    assert validation.evenly(0, 7).tolist() == []


def test_validation_runs_in_the_precision_of_the_run(tiny_shards: ShardSet, tiny_overrides: list[str], monkeypatch):
    """Regression test: validation ran in fp32 under bf16 training, with twice the time and memory, and other numbers than the exported model's."""
    dtypes: list[torch.dtype] = []
    task = task_of(tiny_shards, tiny_overrides, "train.precision=bf16")
    task.model.vision.blocks[0].attn.qkv.register_forward_hook(lambda _m, _i, out: dtypes.append(out.dtype))
    score, _, _ = task.validate()
    assert np.isfinite(score)
    assert set(dtypes) == {torch.bfloat16}
