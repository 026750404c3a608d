"""The training loop: kill and resume, signals, damage, NaN, early stopping, and what a resumed run refuses."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from comtip_fast.config.io import load_config
from comtip_fast.training.checkpoint import store as checkpoints
from comtip_fast.training.checkpoint.run_state import FREE_KEYS, GENES, changed_inputs
from comtip_fast.training.checkpoint.saver import CheckpointSaver
from comtip_fast.training.monitor.monitor import CLOCKED
from comtip_fast.training.optim import learning_rate
from comtip_fast.training.trainer import FitResult, Trainer, TrainingError
from tests.comtip_fast.trainer_standin import SPOTS, Net, StandIn, config_of, fit

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("trainer_standin.py")


def trace(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def assert_same_run(a: Path, b: Path) -> None:
    assert trace(a) == trace(b)
    assert sorted(p.name for p in (a / "checkpoints").iterdir()) == sorted(
        p.name for p in (b / "checkpoints").iterdir()
    )
    files = [p.relative_to(a) for p in a.rglob("*.safetensors")]
    assert files
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    assert (a / "config.yaml").read_bytes() == (b / "config.yaml").read_bytes()


def stop_at(step: int, number: int = signal.SIGTERM) -> Callable[[int], None]:
    return lambda now: os.kill(os.getpid(), number) if now == step else None


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    fit(folder)
    return folder


# -- undisturbed runs ----------------------------------------------------------------------------


def test_run_folder(reference: Path) -> None:
    assert load_config(reference / "config.yaml") == config_of()
    rows = trace(reference)
    assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, 18))
    assert [r["step"] for r in rows if r["kind"] == "valid"] == [3, 6, 9, 12, 15, 17]
    assert {"loss", "nce", "mfm", "lr", "grad_norm", "scale", "skips", "epoch"} <= rows[0].keys()
    assert {"score", "per_cohort", "best"} <= next(r for r in rows if r["kind"] == "valid").keys()
    losses = [r["loss"] for r in rows if r["kind"] == "train"]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_two_runs_are_equal(reference: Path, tmp_path: Path) -> None:
    fit(tmp_path / "again")
    assert_same_run(reference, tmp_path / "again")


def test_every_spot_is_used_once_per_epoch_in_the_order_of_batches(tmp_path: Path) -> None:
    config = config_of("train.steps=10")
    seen: list[list[int]] = []
    task = StandIn(config)
    inner = task.batch
    task.batch = lambda spots, step, epoch: (seen.append(spots.tolist()), inner(spots, step, epoch))[1]
    Trainer(task, config, tmp_path / "run").fit()
    assert [b.tolist() for epoch in (0, 1) for b in task.batches(epoch)] == seen
    assert sorted(spot for batch in seen[:5] for spot in batch) == list(range(SPOTS))


def test_deterministic_setting_is_put_back(tmp_path: Path) -> None:
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # a user's own setting
    try:
        inside: list[bool] = []
        fit(tmp_path / "run", at_step=lambda step: inside.append(torch.are_deterministic_algorithms_enabled()))
        assert all(inside)
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode(before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# -- kill and resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1])
def test_killed_anywhere_and_resumed_ends_the_same(tmp_path: Path, seed: int) -> None:
    path = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "data_shards"))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, str(seed)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3, "too few kills"
    assert_same_run(tmp_path / "reference", tmp_path / "killed")


@pytest.mark.parametrize("step", [1, 4, 7, 9, 16])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_resume_ends_the_same(reference: Path, tmp_path: Path, step: int, number: int) -> None:
    run = tmp_path / "run"
    result = fit(run, "train.keep_checkpoints=2", at_step=stop_at(step, number))
    assert (result.stopped, result.step) == ("sigterm", step)
    assert checkpoints.steps_of(run / "checkpoints")[-1] == step
    assert not (run / "export").exists()
    assert fit(run, resume=True).stopped == "steps"
    assert trace(run) == trace(reference)
    assert (run / "export/model.safetensors").read_bytes() == (reference / "export/model.safetensors").read_bytes()


def test_signal_in_the_last_step_finishes_the_run(tmp_path: Path) -> None:
    assert fit(tmp_path / "run", at_step=stop_at(17)).stopped == "steps"
    assert (tmp_path / "run/export").is_dir()


def test_signal_before_the_first_step(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, original = tmp_path / "run", Trainer._start

    def start(self: Trainer, resume: bool) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, resume)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_start", start)
        assert fit(run).step == 0
    assert checkpoints.steps_of(run / "checkpoints") == [0]
    fit(run, resume=True)
    assert_same_run(reference, run)


def test_resuming_a_finished_run_changes_nothing_and_repairs_the_export(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    shutil.rmtree(run / "export")
    result = fit(run, resume=True)
    assert (result.stopped, result.step) == ("steps", 17)
    assert_same_run(reference, run)


def test_resume_without_a_checkpoint_starts(reference: Path, tmp_path: Path) -> None:
    fit(tmp_path / "run", resume=True)
    assert_same_run(reference, tmp_path / "run")


def test_rows_after_the_checkpoint_are_repeated(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(run, at_step=stop_at(10))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "kind": "train", "loss": 99.0}\n{"step": 12, "kind": "tr')
    fit(run, resume=True)
    assert trace(run) == trace(reference)


@pytest.mark.parametrize("name", [*checkpoints.FILES, "SHA256SUMS"])
def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    reference: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    fit(run, "train.keep_checkpoints=1", at_step=stop_at(10))
    damaged = checkpoints.folder_of(run / "checkpoints", 10)
    (damaged / name).write_bytes(b"\xff" + (damaged / name).read_bytes()[1:])
    with caplog.at_level(logging.INFO, "comtip_fast"):
        fit(run, "train.keep_checkpoints=1", resume=True, at_step=stop_at(13))
    assert "step_00000010" in caplog.text
    assert "resumed from step 9" in caplog.text
    assert (run / "checkpoints/damaged_step_00000010").is_dir()
    assert 13 in checkpoints.steps_of(run / "checkpoints"), "the damaged one must not count as kept"
    fit(run, "train.keep_checkpoints=1", resume=True)
    assert trace(run) == trace(reference)


def test_all_checkpoints_damaged_is_an_error(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    for folder in (run / "checkpoints").iterdir():
        (folder / "model.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"none of the [0-9]+ checkpoints can be read"):
        fit(run, resume=True)


def test_an_interrupted_validation_repeats_no_step(reference: Path, tmp_path: Path) -> None:
    """A validation came before the checkpoint of its step, so a restart met it again, after all steps before it."""
    run, steps = tmp_path / "run", []

    class Killed(StandIn):
        killed = False

        def validation_share(self, progress: Callable[[str], None]) -> float:
            if self.step == 9 and not Killed.killed:
                Killed.killed = True
                raise KeyboardInterrupt
            return super().validation_share(progress)

    def attempt(resume: bool) -> FitResult:
        return Trainer(Killed(config_of(), steps.append), config_of(), run).fit(resume=resume)

    with pytest.raises(KeyboardInterrupt):
        attempt(resume=False)
    assert checkpoints.steps_of(run / "checkpoints")[-1] == 9
    assert attempt(resume=True).stopped == "steps"
    assert steps == list(range(1, 18))
    assert_same_run(reference, run)


def test_a_validation_that_was_logged_before_a_kill_is_logged_once(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(CheckpointSaver, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(run)
    assert trace(run)[-1]["kind"] == "valid"
    assert fit(run, resume=True).stopped == "steps"
    assert_same_run(reference, run)


def test_a_stop_request_does_not_wait_for_a_validation(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fit(run, at_step=stop_at(9)).step == 9
    assert [r["step"] for r in trace(run) if r["kind"] == "valid"] == [3, 6]
    assert fit(run, resume=True).stopped == "steps"
    assert trace(run) == trace(reference)


# -- refused input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=16",
        "data.batch_size=4",
        "train.seed=1",
        "loss.paat.strata=3",
        "optim.betas=[0.8,0.9]",
        "genes.detected_in=every",
    ],
)
def test_resume_with_another_config_names_the_key(reference: Path, tmp_path: Path, change: str) -> None:
    shutil.copytree(reference, tmp_path / "run")
    with pytest.raises(TrainingError, match=change.split("=", maxsplit=1)[0].replace(".", r"\.")):
        fit(tmp_path / "run", change, resume=True)


def test_logging_and_keeping_may_change(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(run, at_step=stop_at(8))
    free = ["train.log_every=2", "train.keep_checkpoints=9", "train.checkpoint_every=1", "name=other", "data.shards=x"]
    free += ["data.stem_features=memory"]
    fit(run, *free, resume=True)
    assert (run / "export/model.safetensors").read_bytes() == (reference / "export/model.safetensors").read_bytes()
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == "other"


def test_a_finished_run_continues_with_more_steps_and_another_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A longer run, another learning rate and another interval were refused."""
    run, seen = tmp_path / "run", []
    assert fit(run).stopped == "steps"
    longer = ["train.steps=20", "optim.lr=0.01", "train.validate_every=4", "train.threads=1"]
    result = fit(run, *longer, resume=True, at_step=seen.append)
    assert (result.stopped, result.step, seen) == ("steps", 20, [18, 19, 20])
    assert "optim.lr changed from 0.05 to 0.01; the new value applies from step 18" in caplog.text
    rows = trace(run)
    assert [r["step"] for r in rows if r["kind"] == "valid"] == [3, 6, 9, 12, 15, 17, 20]
    rates = {r["step"]: r["lr"] for r in rows if r["kind"] == "train"}
    config = config_of(*longer)
    assert all(rates[step] == learning_rate(step, 20, config.optim) for step in seen)
    assert fit(run, *longer, resume=True).step == 20


def test_a_run_that_lost_patience_continues_with_more(tmp_path: Path) -> None:
    run, scores = tmp_path / "run", {2: 1.0}
    assert run_with_scores(run, scores, "train.patience=2")[0].step == 6
    result, _ = run_with_scores(run, scores, "train.patience=3", resume=True)
    assert (result.stopped, result.step) == ("patience", 8)


def test_fewer_steps_end_a_run_at_its_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(run, at_step=stop_at(8))
    assert fit(run, "train.steps=8", "train.validate_every=0", resume=True).step == 8
    with pytest.raises(TrainingError, match=r"train\.steps=7 is below the step of the checkpoint \(8\)"):
        fit(run, "train.steps=7", resume=True)


def test_a_checkpoint_without_newer_keys_keeps_its_rules(tmp_path: Path) -> None:
    """Keys that came later take the values of the behaviour before them, not today's defaults."""
    run = tmp_path / "run"
    fit(run, at_step=stop_at(8))
    folder = checkpoints.folder_of(run / "checkpoints", 8)
    state = json.loads((folder / "state.json").read_text())
    del state["config"]["genes"]["detected_in"], state["config"]["panel"]["balance"], state["validated"]
    checkpoints.replace_state(run / "checkpoints", 8, state)
    with pytest.raises(TrainingError, match=r"genes\.detected_in \(every -> any\), panel\.balance \(none -> assay\)"):
        fit(run, resume=True)
    assert fit(run, "genes.detected_in=every", "panel.balance=none", resume=True).stopped == "steps"


def test_settings_of_the_readout_may_change_because_it_is_fitted_at_export(reference: Path, tmp_path: Path) -> None:
    """Otherwise, a run that began before the default of ``readout.kind`` changed could not be resumed with its config file."""
    run = shutil.copytree(reference, tmp_path / "run")
    assert fit(run, "readout.kind=linear", "readout.views=1", resume=True).stopped == "steps"


def test_other_trained_genes_are_refused_where_the_checkpoint_states_them() -> None:
    """Genes depend on more than the set: on statistics without damaged records, and on the version."""
    then = {"shards": "a", "gene vectors": "v"}
    assert changed_inputs(then, then | {GENES: "new"}) == []
    assert changed_inputs(then | {GENES: "old"}, then | {GENES: "new"}) == [GENES]
    assert changed_inputs(then, {"shards": "b"}) == ["gene vectors", "shards"]


def test_every_key_that_may_change_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/fault_tolerance.md").read_text()
    table = page.split("## Keys that may change on resume")[1].split("## ")[0]
    documented: set[str] = set()
    for line in table.splitlines():
        group = ""
        for name in re.findall(r"`([a-z_.*]+)`", line.split("|")[1]) if line.startswith("| `") else ():
            group = name.partition(".")[0] + "." if "." in name else group
            documented.add(name if "." in name or name == "name" else group + name)
    groups = tuple(name.removesuffix("*") for name in documented if name.endswith("*"))
    assert {key for key in FREE_KEYS if key not in documented and not key.startswith(groups)} == set()
    assert {name for name in documented if not name.endswith("*")} <= FREE_KEYS


def test_resume_on_other_data_is_refused(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    task = StandIn(config_of())
    task.data_hash = "other"
    with pytest.raises(TrainingError, match="has changed: shards"):
        Trainer(task, config_of(), tmp_path / "run").fit(resume=True)


def test_a_folder_with_a_run_needs_resume(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    with pytest.raises(TrainingError, match=r"already holds a run .*`resume`"):
        fit(tmp_path / "run")
    assert_same_run(reference, tmp_path / "run")


def test_a_second_process_is_kept_out_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    hold = (
        "import fcntl,os,sys,time; f=open(sys.argv[1],'w'); fcntl.flock(f,fcntl.LOCK_EX); "
        "f.write(str(os.getpid())); f.flush(); print('held',flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, run / "run.lock"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(TrainingError, match=f"in use by process {other.pid}"):
            fit(run)
        other.kill()
    assert (run / "run.lock").read_text() == str(other.pid)
    assert fit(run).stopped == "steps"


def test_no_batches_is_an_error(tmp_path: Path) -> None:
    task = StandIn(config_of())
    task.batches = lambda epoch: []
    with pytest.raises(TrainingError, match="epoch 0 has no batch: no readable spot in a section of split train"):
        Trainer(task, config_of(), tmp_path / "run").fit()


# -- validation, early stopping, pruning, export ------------------------------------------------------------------


def run_with_scores(folder: Path, scores: dict[int, float], *overrides: str, resume: bool = False) -> tuple[Any, Any]:
    config = config_of("train.validate_every=2", *overrides)
    task = StandIn(config)
    task.scores = dict.fromkeys(range(1, 100), 0.0) | scores
    return Trainer(task, config, folder).fit(resume=resume), task


def test_patience_stops_and_the_best_weights_are_exported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    scores = {2: 0.1, 4: 0.05, 6: 0.5, 8: 0.5, 10: 0.2}
    result, _ = run_with_scores(run, scores, "train.patience=3", "train.steps=90")
    # The bad score of step 4 no longer counts once step 6 is better; an equal score (step 8) is not better.
    assert (result.stopped, result.step, result.best_step, result.best_score) == ("patience", 12, 6, 0.5)
    assert checkpoints.steps_of(run / "checkpoints") == [6, 10, 12]
    best = checkpoints.load(run / "checkpoints/step_00000006").model
    exported = load_file(run / "export/model.safetensors")
    assert all(torch.equal(best[k], exported[k]) for k in best)


def test_without_validation_the_last_weights_are_exported(tmp_path: Path) -> None:
    result = fit(tmp_path / "run", "train.validate_every=0")
    assert (result.best_step, result.stopped) == (0, "steps")
    last = checkpoints.load(tmp_path / "run/checkpoints/step_00000017").model
    exported = load_file(tmp_path / "run/export/model.safetensors")
    assert all(torch.equal(last[k], exported[k]) for k in last)


def test_missing_scores_do_not_count_for_patience(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nan = dict.fromkeys(range(1, 100), float("nan"))
    result, _ = run_with_scores(tmp_path / "run", nan, "train.patience=2")
    assert (result.stopped, result.step, result.best_step) == ("steps", 17, 0)
    assert "validation has no score" in caplog.text
    assert next(r for r in trace(tmp_path / "run") if r["kind"] == "valid")["score"] is None


def test_pruning_keeps_newest_and_best(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_with_scores(run, {2: 1.0}, "train.keep_checkpoints=3", "train.checkpoint_every=1")
    assert checkpoints.steps_of(run / "checkpoints") == [2, 15, 16, 17]


def test_resume_tidies_up_after_a_killed_process(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(run, "train.keep_checkpoints=9")
    (run / "checkpoints/.writing-00000018").mkdir()
    (run / "checkpoints/.deleting-step_00000001").mkdir()
    fit(run, resume=True)
    assert_same_run(run, reference)


def test_a_lost_best_checkpoint_is_reported_and_the_last_weights_are_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    _, task = run_with_scores(run, {2: 1.0})
    (run / "checkpoints/step_00000002/model.safetensors").write_bytes(b"")
    config = config_of("train.validate_every=2")
    result = Trainer(task, config, run).fit(resume=True)
    assert result.best_step == 0
    assert "cannot use the best checkpoint (step 2, score 1.0000)" in caplog.text
    last = checkpoints.load(run / "checkpoints/step_00000017").model
    assert torch.equal(last["teacher"], load_file(run / "export/model.safetensors")["teacher"])


# -- NaN -------------------------------------------------------------------------------------------


def run_with_nan(folder: Path, steps: dict[int, str], *overrides: str, resume: bool = False) -> Any:
    config = config_of(*overrides)
    task = StandIn(config)
    task.nan_steps = steps
    return Trainer(task, config, folder).fit(resume=resume)


def nonfinite(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]


def test_nan_loss_stops_with_step_part_and_spots(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"step 7: loss part mfm is not finite .*spots \d+, .*nan_policy=skip"):
        run_with_nan(run, {7: "loss"})
    (record,) = nonfinite(run)
    assert (record["step"], record["epoch"], record["position"]) == (7, 1, 1)
    assert record["parts"]["mfm"] is None
    assert record["parts"]["nce"] > 0
    assert record["spot_index"] == StandIn(config_of()).batches(1)[1].tolist()


@pytest.mark.parametrize("clip", ["0", "1"])
def test_nan_gradient_names_the_parameter_and_no_other(tmp_path: Path, clip: str) -> None:
    with pytest.raises(TrainingError, match=r"step 5: the gradient is not finite .*first body\.1\.bias"):
        run_with_nan(tmp_path / "run", {5: "gradient"}, f"optim.clip={clip}")
    (record,) = nonfinite(tmp_path / "run")
    assert record["gradients"] == ["body.1.bias"], "clipping must not spread the NaN before it is looked for"


def test_skip_leaves_weights_and_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    result = run_with_nan(
        run,
        {4: "loss", 8: "gradient"},
        "train.nan_policy=skip",
        "train.checkpoint_every=1",
        "train.keep_checkpoints=99",
        "train.log_every=1",
    )
    assert result.stopped == "steps"
    before, after = (checkpoints.load(checkpoints.folder_of(run / "checkpoints", s)) for s in (3, 4))
    assert all(torch.equal(before.model[k], after.model[k]) for k in before.model)
    assert all(torch.equal(before.optim[k], after.optim[k]) for k in before.optim)
    rows = {r["step"]: r for r in trace(run) if r["kind"] == "train"}
    assert [rows[s]["skips"] for s in (3, 4, 7, 8, 17)] == [0, 1, 1, 2, 2]
    assert rows[4]["loss"] is None
    assert "update skipped (2 so far)" in caplog.text
    assert len(nonfinite(run)) == 2


def test_skip_stops_after_max_skips(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 6: .*max_skips=2"):
        run_with_nan(tmp_path / "run", dict.fromkeys((2, 4, 6), "loss"), "train.nan_policy=skip", "train.max_skips=2")


def test_a_run_stopped_by_nan_can_continue_with_skips(tmp_path: Path) -> None:
    stopped, straight, bad = tmp_path / "stopped", tmp_path / "straight", {7: "loss"}
    with pytest.raises(TrainingError):
        run_with_nan(stopped, bad)
    run_with_nan(stopped, bad, "train.nan_policy=skip", resume=True)
    run_with_nan(straight, bad, "train.nan_policy=skip")
    assert_same_run(stopped, straight)
    assert nonfinite(stopped) == nonfinite(straight)


# -- work of the host in a step ---------------------------------------------------------------------


class Modes(StandIn):
    """A stand-in that keeps the mode of its module in each step, and collections of garbage within the losses."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.modes: list[bool] = []
        self.walks = 0
        self.collections = 0
        walk = self.module.train

        def train(mode: bool = True) -> nn.Module:
            self.walks += mode
            return walk(mode)

        self.module.train = train  # type: ignore[method-assign]

    def losses(self, module: Net, batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        self.modes.append(all(m.training for m in self.module.modules()))
        gc.callbacks.append(self._count)
        kept = [[] for _ in range(5 * gc.get_threshold()[0])]  # as many objects as start a collection
        gc.callbacks.remove(self._count)
        assert kept
        return super().losses(module, batch)

    def _count(self, phase: str, info: dict[str, int]) -> None:
        self.collections += 1


def test_a_step_walks_no_modules_and_collects_no_garbage(tmp_path: Path):
    config = config_of("train.steps=12", "train.validate_every=4")
    task = Modes(config)
    Trainer(task, config, tmp_path).fit()
    assert task.modes == [True] * 12
    assert task.walks == 3  # at the start and after the validations of steps 4 and 8
    assert task.collections == 0
    assert gc.isenabled()
