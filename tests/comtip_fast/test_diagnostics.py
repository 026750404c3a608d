"""Diagnostics never end a run, and never precede the check for losses that are not finite."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from comtip_fast.config.io import load_config
from comtip_fast.objectives import feature_health, pair_auc
from comtip_fast.training import losses, validation
from comtip_fast.training.monitor import diagnostics, nonfinite
from comtip_fast.training.monitor import monitor as watch
from comtip_fast.training.protocol import TrainingError
from comtip_fast.training.task import CoMTIPTask, build_task
from comtip_fast.training.trainer import Trainer
from comtip_fast.training.validation import SPACE, space_numbers
from tests.comtip_fast.trainer_standin import StandIn, config_of, fit

NAN = float("nan")


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_numbers_over_features_that_are_not_finite_are_nan(bad: float):
    patches = torch.rand(3, 4, 8)
    patches[1, 2, 3] = bad
    assert set(feature_health(patches)) == set(feature_health(torch.rand(3, 4, 8)))
    assert all(math.isnan(v) for v in feature_health(patches).values())
    assert all(math.isnan(v) for v in feature_health(patches[:0]).values())
    image, text = torch.rand(5, 8), torch.rand(5, 8)
    assert set(space_numbers(image, text)) == set(SPACE)
    image[2, 1] = bad
    for pair in ((image, text), (text, image), (text[:0], text[:0])):
        assert all(math.isnan(v) for v in space_numbers(*pair).values())
        assert set(space_numbers(*pair)) == set(SPACE)


def test_an_auc_over_a_nan_is_nan():
    true, false, counted = torch.rand(2, 3), torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
    true[0, 0] = NAN
    assert math.isnan(pair_auc(true, false, counted))
    counted[0, 0] = False
    assert math.isfinite(pair_auc(true, false, counted))


def rows_of(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def with_nan_features(overrides: list[str], at: set[int]) -> tuple[CoMTIPTask, Any]:
    """Return a task whose patch features are NaN in the steps ``at``, as after an overflow."""
    config = load_config(None, overrides)
    task = build_task(config, torch.device("cpu"))
    step, batch = [0], task.batch

    def watched(spots: Any, number: int, epoch: int) -> Any:
        step[0] = number
        return batch(spots, number, epoch)

    def corrupt(_module: Any, _inputs: Any, out: Tensor) -> Tensor:
        return out * NAN if step[0] in at and task.model.training else out

    task.batch = watched  # type: ignore[method-assign]
    task.model.vision.blocks[0].register_forward_hook(corrupt)
    return task, config


SHORT = ["train.steps=4", "train.validate_every=4", "train.device=cpu"]


@pytest.mark.parametrize("pieces", [1, 3])
def test_nan_features_reach_the_check(pieces: int, tiny_overrides: list[str], tmp_path: Path):
    more = [*SHORT, f"engine.micro_batches={pieces}"]
    task, config = with_nan_features([*tiny_overrides, *more], {2})
    with pytest.raises(TrainingError, match=r"step 2: loss parts? .* not finite.*nan_policy=skip"):
        Trainer(task, config, tmp_path / "stop").fit()
    (record,) = [json.loads(line) for line in (tmp_path / "stop" / "nonfinite.jsonl").read_text().splitlines()]
    assert record["step"] == 2

    task, config = with_nan_features([*tiny_overrides, *more, "train.nan_policy=skip"], {2})
    result = Trainer(task, config, tmp_path / "skip").fit()
    assert (result.step, result.stopped) == (4, "steps")
    second = rows_of(tmp_path / "skip")[1]
    assert (second["patch_rank"], second["skips"]) == (None, 1)
    assert (tmp_path / "skip" / "export" / "model.safetensors").is_file()


def test_predictions_of_nan_have_no_score(tiny_overrides: list[str]):
    task = build_task(load_config(None, [*tiny_overrides, *SHORT]), torch.device("cpu"))
    with torch.no_grad():
        next(task.model.vision.blocks[0].parameters()).fill_(NAN)
    score, per_cohort, space = task.validate()
    assert math.isnan(score), "a score of 0 would make a model of NaN the best one"
    assert all(math.isnan(v) for v in (*per_cohort.values(), *space.values()))


def broken(*_args: Any, **_kwargs: Any) -> Any:
    raise RuntimeError("a diagnostic that fails")


def test_no_diagnostic_of_the_task_ends_a_run(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(diagnostics, "_REPORTED", set())
    for module, name in ((losses, "feature_health"), (losses, "pair_auc"), (validation, "space_numbers")):
        monkeypatch.setattr(module, name, broken)
    config = load_config(None, [*tiny_overrides, *SHORT])
    assert Trainer(build_task(config, torch.device("cpu")), config, tmp_path / "run").fit().stopped == "steps"
    for row in rows_of(tmp_path / "run"):
        for name in ("patch_variance", "patch_rank", "pair_auc", "pair_auc_gain"):
            assert row[name] is None, (name, row)
    (row,) = rows_of(tmp_path / "run", "valid")
    assert row["score"] is not None
    assert [row[name] for name in SPACE] == [None] * len(SPACE)
    warnings = [m for m in caplog.messages if "a diagnostic that fails" in m]
    assert len(warnings) == 3, "each is logged once, as a warning"


def full(*_args: Any, **_kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.jsonl")


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (watch.ThroughputMeter, "add", broken),
        (watch.ThroughputMeter, "row", broken),
        (watch.SpikeDetector, "update", broken),
        (watch.Profiler, "before", broken),
        (watch.Profiler, "after", full),
        (watch.Profiler, "close", full),
        (watch.Events, "flag", full),
    ],
)
def test_no_diagnostic_of_the_loop_ends_a_run(
    owner: type, name: str, error: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(owner, name, error)
    if owner is watch.Events:
        monkeypatch.setattr(watch.SpikeDetector, "update", lambda *_: "something is wrong")
    result = fit(tmp_path / "run", "watch.trace=[2,3]")
    assert (result.step, result.stopped) == (17, "steps")
    assert len(rows_of(tmp_path / "run")) == 17


def test_a_full_disk_does_not_hide_a_loss_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nonfinite, "append_row", full)
    config = config_of()
    task = StandIn(config)
    task.nan_steps = {3: "loss"}
    with pytest.raises(TrainingError, match="step 3: loss part mfm is not finite"):
        Trainer(task, config, tmp_path / "run").fit()
