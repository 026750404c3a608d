"""Rates and decay by part of the model, and parameters that are frozen for all or for some steps."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comtip_shards import ShardSet
from safetensors.torch import load_file

from comtip_fast.config.io import ConfigError, load_config
from comtip_fast.config.schema import OptimConfig, RunConfig
from comtip_fast.models import CoMTIP, ModelSizes
from comtip_fast.plan.hardware import make_cluster
from comtip_fast.plan.plan import Plan, make_plan
from comtip_fast.plan.sizes import Inputs
from comtip_fast.training.freezing import Freezing
from comtip_fast.training.optim import make_optimizer, set_rate
from comtip_fast.training.protocol import TrainingError
from testkit.distributed import run_distributed

ROOT = Path(__file__).parents[2]
SIZES = ModelSizes(tile_px=32, n_levels=4, vocab_size=40, n_identities=6, longest=7)
SMALL = ["vision.patch_px=8", "vision.width=16", "vision.depth=3", "vision.heads=2", "text.width=16", "text.heads=2"]


def load_script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


standin = load_script(Path(__file__).with_name("trainer_standin.py"))
curves = load_script(ROOT / "bench" / "train" / "curves.py")


def config(*overrides: str) -> RunConfig:
    return load_config(None, [*SMALL, *overrides])


def groups_by_name(model: torch.nn.Module, optim: OptimConfig) -> dict[str, tuple[float, float]]:
    """Return (rate at a common rate of 1, weight decay) of every trained parameter."""
    optimizer = make_optimizer(model, optim)
    set_rate(optimizer, 1.0)
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_by_default_there_are_two_groups_in_the_order_of_the_model() -> None:
    model = CoMTIP(config(), SIZES)
    groups = make_optimizer(model, OptimConfig()).param_groups
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [[id(p) for p in g["params"]] for g in groups] == [
        [id(p) for p in trained if p.ndim >= 2],
        [id(p) for p in trained if p.ndim < 2],
    ]
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0]


def test_every_part_has_its_own_rate_and_decay() -> None:
    run = config("optim.vision.lr_scale=0.1", "optim.text.lr_scale=0.5", "optim.heads.weight_decay=0.3")
    found = groups_by_name(CoMTIP(run, SIZES), run.optim)
    assert found["vision.blocks.0.mlp.fc1.weight"] == (0.1, 0.05)
    assert found["vision.blocks.0.mlp.fc1.bias"] == (0.1, 0.0)
    assert found["genes.token_Vd"] == (0.5, 0.05)
    assert found["project_image.skip.weight"] == (1.0, 0.3)
    assert found["log_scale_nce"] == (1.0, 0.0)


def test_layer_decay_is_that_of_timm() -> None:
    run = config("optim.vision.layer_decay=0.5", "optim.vision.lr_scale=0.2")
    found = groups_by_name(CoMTIP(run, SIZES), run.optim)
    # Three blocks: timm counts the final norm to the last block, whose factor is 1, and the embedding as a layer of its own.
    expected = {"patch_embed.proj.weight": 0.5**3, "pos_embed": 0.5**3, "norm.weight": 1.0}
    expected |= {f"blocks.{i}.norm1.weight": 0.5 ** (2 - i) for i in range(3)}
    for name, factor in expected.items():
        assert found[f"vision.{name}"][0] == pytest.approx(0.2 * factor), name
    assert found["project_image.skip.weight"][0] == 1.0


def test_frozen_names_are_modules_parameters_or_patterns() -> None:
    model = CoMTIP(config(), SIZES)
    schedule = Freezing(model, (("vision.blocks.[01]", 5), ("vision.pos_embed", 0), ("*.norm", 3)))
    first, later = schedule.frozen_at(5), schedule.frozen_at(6)
    assert {"vision.blocks.0.norm1.weight", "vision.blocks.1.mlp.fc1.bias", "vision.pos_embed"} <= first
    assert "vision.norm.weight" in schedule.frozen_at(3) - first
    assert not [n for n in first if n.startswith(("vision.blocks.2", "genes."))]
    assert later == {"vision.pos_embed"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([["vison", 0]], r"'vison' names no trainable parameter .* similar names are .*vision"),
        ([["*", 3]], "remove a pattern"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rules: list[list[object]], message: str) -> None:
    run = config(f"optim.freeze={json.dumps(rules)}")
    with pytest.raises(TrainingError, match=message):
        Freezing(CoMTIP(run, SIZES), run.optim.freeze)


def test_a_rule_for_what_is_never_trained_says_so() -> None:
    run = config("optim.freeze=[[generator, 0]]", "loss.mfm=0")
    with pytest.raises(
        TrainingError, match="'generator' names only parameters that this model never trains; remove it"
    ):
        Freezing(CoMTIP(run, SIZES), run.optim.freeze)


@pytest.mark.slow
def test_with_deepspeed_a_run_ends_at_the_thaw_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that the user changes while the run is stopped gives the same run as one with the step from the beginning."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    output = run_distributed([str(Path(__file__).with_name("thaw_worker.py")), str(tmp_path)], 2, fork=True)
    (runs, _), (_, reads) = (json.loads(text.splitlines()[-1]) for text in output)
    assert reads == 0, "rank 1 read a checkpoint that rank 0 sends"
    for stage in (1, 3):
        found, message = runs[f"through_the_thaw{stage}"]
        assert found == pytest.approx(runs["ddp"][0], rel=1e-4)
        assert "optim.freeze thaws parameters after step 6" in message
        found, message = runs[f"thawed_by_the_user{stage}"]
        assert found == pytest.approx(runs["ddp"][0], rel=1e-4)
        assert "step counts differ" in message
        assert "keep their names in optim.freeze and give the step of the checkpoint" in message


@pytest.mark.parametrize("value", ["[[vision, -1]]", "[vision]", "[[vision, 1.5]]", "[['', 1]]"])
def test_values_out_of_bounds_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"optim\.freeze"):
        config(f"optim.freeze={value}")


def test_a_frozen_part_keeps_its_weights_and_has_no_optimizer_state(tmp_path: Path) -> None:
    rules = "optim.freeze=[[body.0, 6], [body.1.bias, 0]]"
    standin.fit(tmp_path, rules, "train.keep_checkpoints=9", "train.validate_every=0", "train.steps=8")
    state = {n: tmp_path / "checkpoints" / f"step_{n:08d}" for n in (4, 8)}
    before, after = (load_file(state[n] / "model.safetensors") for n in (4, 8))
    initial = standin.StandIn(standin.config_of()).module.state_dict()
    assert torch.equal(before["body.0.weight"], initial["body.0.weight"])
    assert not torch.equal(after["body.0.weight"], initial["body.0.weight"])
    assert torch.equal(after["body.1.bias"], initial["body.1.bias"])
    steps = {
        n: {k: float(v) for k, v in load_file(state[n] / "optim.safetensors").items() if k.endswith("step")}
        for n in state
    }
    assert not [k for k in steps[4] if k.startswith(("body.0", "body.1.bias"))]
    assert (steps[8]["body.0.weight/step"], steps[8]["body.3.weight/step"]) == (2, 8)
    assert "body.1.bias/step" not in steps[8]


@pytest.mark.parametrize("stop", [3, 6, 7])
def test_a_run_resumes_over_the_thaw_exactly(stop: int, tmp_path: Path) -> None:
    rules = ["optim.freeze=[[body.0, 6]]", "optim.heads.weight_decay=0.3"]
    standin.fit(tmp_path / "whole", *rules, "train.steps=10")
    standin.fit(tmp_path / "parts", *rules, "train.steps=10", at_step=lambda step: stop_at(step, stop))
    standin.fit(tmp_path / "parts", *rules, "train.steps=10", resume=True)
    whole, parts = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert curves.losses(tmp_path / "parts") == curves.losses(tmp_path / "whole")


def stop_at(step: int, stop: int) -> None:
    if step == stop:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_two_ranks_thaw_and_resume_as_one_process(tiny_shards: ShardSet, tmp_path: Path) -> None:
    """DDP, and ZeRO 2 then 3: thaw at steps 5 and 9, stopped and resumed at step 6 (all: bench/train/curves.py --runs frozen)."""
    rows = curves.run(str(tiny_shards.path), tmp_path, 12, [2], "frozen-quick")
    assert [row["ok"] for row in rows] == [True, True], rows


def test_the_plan_counts_what_stays_frozen_and_not_what_thaws() -> None:
    def plan(freeze: str) -> Plan:
        return make_plan(
            config(f"optim.freeze={freeze}"), make_cluster("h100", per_node=1), Inputs(tile_px=32, panel=8)
        )

    whole, frozen, thawed = plan("[]"), plan("[[vision, 0]]"), plan("[[vision, 9]]")
    assert frozen.sizes.trained_in("image encoder") == 0
    assert frozen.sizes.trained + frozen.sizes.frozen == whole.sizes.trained + whole.sizes.frozen
    assert frozen.device_bytes < whole.device_bytes
    back = [next(p.sum("back_flops") for p in x.parts if p.name == "vision, full") for x in (frozen, whole)]
    assert back[0] < back[1] / 5  # pooling and projection alone have a backward pass
    assert thawed.sizes == whole.sizes
