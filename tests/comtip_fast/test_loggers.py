"""Loggers: the JSONL file, the progress lines, TensorBoard and Weights & Biases."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from comtip_fast.config.io import config_to_dict, load_config
from comtip_fast.training.monitor.loggers import JsonlLogger, Progress, TensorBoardLogger, WandbLogger, make_loggers

TRAIN = {"step": 10, "kind": "train", "loss": 1.5, "nce": 0.5, "lr": 1e-3, "spots_per_s": 321.0}
VALID = {"step": 20, "kind": "valid", "score": 0.25, "per_cohort": {"human_breast": 0.25}, "best": True}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_jsonl_is_on_disk_at_once_and_numbers_are_exact(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "m.jsonl", None)
    row = {"step": 1, "kind": "train", "loss": 0.1 + 0.2}
    logger.log(row)
    assert rows_of(tmp_path / "m.jsonl") == [row]
    logger.close()


def test_jsonl_has_no_nan(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "m.jsonl", None)
    logger.log({"step": 1, "kind": "x", "a": float("nan"), "b": {"c": float("inf")}, "d": [float("-inf"), 1.0]})
    logger.close()
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "kind": "x",
        "a": None,
        "b": {"c": None},
        "d": [None, 1.0],
    }


def test_jsonl_keeps_rows_up_to_the_step_and_drops_a_half_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": s, "kind": "train"}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "ki')
    JsonlLogger(path, 2).close()
    assert [r["step"] for r in rows_of(path)] == [1, 2]
    JsonlLogger(path, None).close()
    assert rows_of(path) == []


def test_progress_prints_lines_with_step_loss_speed_and_time_left() -> None:
    stream = io.StringIO()  # not a terminal
    progress = Progress(total=100, start=0, stream=stream)
    progress.log(TRAIN)
    progress.log(VALID)
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"step 10/100  loss 1\.5000  nce 0\.5000  321 spots/s  \d+:\d\d min left", first)
    assert second == "step 20/100  validation 0.2500  (human_breast 0.2500)  best"
    progress.log(VALID | {"score": float("nan"), "per_cohort": {}, "best": False})


def test_only_the_file_and_the_lines_by_default(tmp_path: Path) -> None:
    config = load_config(None)
    loggers = make_loggers(config, config_to_dict(config), tmp_path, start=0, resumed=False)
    assert [type(x) for x in loggers] == [JsonlLogger, Progress]
    for logger in loggers:
        logger.close()


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path, 0)
    logger.log(TRAIN)
    logger.log(VALID)
    logger.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"train/loss", "train/lr", "valid/score", "valid/per_cohort/human_breast"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 1.5)]


@pytest.mark.parametrize(
    ("module", "override"), [("torch.utils.tensorboard", "train.tensorboard=true"), ("wandb", "train.wandb=project")]
)
def test_a_missing_service_names_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, override: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    config = load_config(None, [override])
    with pytest.raises(ValueError, match=r"pip install 'comtip-fast\[log\]'"):
        make_loggers(config, {}, tmp_path, start=0, resumed=False)


def test_wandb_gets_numbers_by_step_and_a_resumed_run_keeps_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    sent: list[tuple[dict[str, float], int]] = []
    run = SimpleNamespace(log=lambda row, step: sent.append((row, step)), finish=lambda: None)
    fake = SimpleNamespace(init=lambda **options: (started.append(options), run)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        logger = WandbLogger("project", tmp_path, {"a": 1})
        logger.log(VALID)
        logger.close()
    assert started[0]["project"] == "project"
    assert started[0]["id"] == started[1]["id"]
    assert sent[0] == ({"valid/score": 0.25, "valid/per_cohort/human_breast": 0.25, "valid/best": 1.0}, 20)
