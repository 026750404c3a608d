"""Validation in chunks: bounded memory, the run's precision, a cap on spots, and the same score."""

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comtip_shards import ShardSet
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import open_source
from torch import Tensor

from comtip_fast.config.io import load_config
from comtip_fast.models import CoMTIP
from comtip_fast.training import validation
from comtip_fast.training.task import CoMTIPTask, build_task
from testkit import tiny
from testkit.distributed import run_distributed

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
    monkeypatch.setattr(validation, "STEM_CHUNK", 2)
    monkeypatch.setattr(validation, "KEPT_BYTES", kept)
    by_stem: list[int] = []
    plain = task.model.vision.stem_features
    monkeypatch.setattr(task.model.vision, "stem_features", lambda x: by_stem.append(x.shape[0]) or plain(x))
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
    assert max(by_stem) <= (2 if stem else 5)
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
    task, calls = task_of(tiny_shards, tiny_overrides, "train.precision=bf16"), []
    for side, layer in (("image", task.model.vision.blocks[0].attn.qkv), ("text", task.model.genes.blocks[0].qkv)):
        layer.register_forward_hook(lambda _m, _i, out, side=side: calls.append((side, out.dtype)))
    score, _, space = task.validate()
    assert np.isfinite([score, *space.values()]).all()
    assert set(calls) == {("image", torch.bfloat16), ("text", torch.bfloat16)}
    n = sum(s.split == "val" for s in tiny_shards.manifest.sections)
    assert [side for side, _ in calls].count("text") == 2 * n  # scores, and statistics of the shared space


@pytest.mark.parametrize("lost", [5, None], ids=["one", "all"])
def test_records_that_are_unreadable_the_second_time_are_left_out(
    tiny_shards: ShardSet, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, lost: int | None
):
    """Regression test: cached tiles of spots without counts were paired with the expression of other spots."""
    task = task_of(tiny_shards, tiny_overrides, "data.faults=skip")
    task.validate()
    plain, paired = task.loader.counts, []

    def counts(spots: np.ndarray):
        kept, values = plain(spots)
        keep = np.flatnonzero(np.arange(kept.size) != lost) if lost else np.zeros(0, np.int64)
        return kept[keep], values[keep]

    def pcc(self: validation.Validation, rows: np.ndarray, measured: np.ndarray, image: Tensor) -> float:
        paired.append((measured.shape[0], image.shape[0]))
        return real(self, rows, measured, image)

    real = validation.Validation._pcc
    monkeypatch.setattr(validation.Validation, "_pcc", pcc)
    monkeypatch.setattr(task.loader, "counts", counts)
    score, _, _ = task.validate()
    assert np.isfinite(score) == bool(lost)
    assert all(one == other for one, other in paired)
    assert len(paired) == bool(lost)


# -- over ranks -----------------------------------------------------------------------------------------------


WORKER = Path(__file__).with_name("validation_worker.py")


@pytest.fixture(scope="module")
def three_val(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A shard set with three validation sections of two sizes."""
    folder = tmp_path_factory.mktemp("three_val")
    sections = [tiny.TinySection(f"v{i}", f"donor_v{i}", "val") for i in range(3)]
    source = tiny.write_tiny_source(folder / "source", [tiny.TinySection("t1", "donor_a", "train"), *sections])
    build_shards(open_source(source.parent), folder / "shards", tile_px=32, tile_um=224.0, min_mpp=5.0)
    return ShardSet(folder / "shards")


def on_two_ranks(mode: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    outputs = run_distributed([str(WORKER), mode, str(folder), *overrides], 2, timeout_s=240, fork=True)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def test_two_ranks_score_what_one_scores(three_val: ShardSet, tiny_overrides: list[str], tmp_path: Path):
    first, second = on_two_ranks("score", tmp_path, *tiny_overrides, f"data.shards={three_val.path}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = task_of(three_val, tiny_overrides).validate()
    torch.set_num_threads(threads)
    assert np.isfinite(one[0])
    assert first["result"] == second["result"] == list(one), "bit-identical"
    assert sorted(first["sections"] + second["sections"]) == [1, 2, 3]
    assert first["sections"]
    assert second["sections"]
    # An error of one rank is reported on every rank.
    assert first["error"] == "TrainingError: rank 1: the section cannot be read"
    assert second["error"] == "OSError: the section cannot be read"


def test_a_validation_may_last_longer_than_a_collective(three_val: ShardSet, tiny_overrides: list[str], tmp_path: Path):
    """Rank 0 validated alone, and the other ranks waited for it in a collective with ``engine.timeout_s``."""
    more = ["train.steps=2", "train.validate_every=1", "engine.timeout_s=10", "readout.kind=levels"]
    settings = [*tiny_overrides, f"data.shards={three_val.path}", *more]
    assert on_two_ranks("slow", tmp_path / "run", *settings) == [{"step": 2}] * 2
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "valid"] == [1, 2]


def test_sections_are_shared_by_their_spots():
    shares = [validation.balanced_share([10, 3, 3, 4, 9], rank, 2) for rank in range(2)]
    assert shares == [[0, 1, 2], [3, 4]]
    assert [validation.balanced_share([5], rank, 3) for rank in range(3)] == [[0], [], []]


def test_memory_does_not_grow_with_the_validation_sections(
    three_val: ShardSet, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
):
    """The vectors, spots and expression of a section are released before the next section."""
    task = task_of(three_val, tiny_overrides, f"data.shards={three_val.path}")
    monkeypatch.setattr(validation, "KEPT_BYTES", 0)
    alive: list[int] = []
    vectors: list[weakref.ref[Tensor]] = []
    encode = validation.Validation._encode

    def watched(self: validation.Validation, *args: Any) -> Any:
        alive.append(sum(ref() is not None for ref in vectors))
        spots, image = encode(self, *args)
        vectors.append(weakref.ref(image))
        return spots, image

    monkeypatch.setattr(validation.Validation, "_encode", watched)
    held = set(vars(task.validation))
    task.validate()
    assert len(vectors) == 3
    assert max(alive) <= 1, "at most the section before is still held"
    assert set(vars(task.validation)) == held
    assert not task.validation._kept
