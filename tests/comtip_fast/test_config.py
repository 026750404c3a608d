"""Config files are read strictly and written exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from comtip_fast.config.io import (
    RENAMED,
    ConfigError,
    config_from_dict,
    config_to_dict,
    dump_config,
    flatten,
    load_config,
    validate,
)
from comtip_fast.config.schema import OptimConfig, RunConfig

FORMER = next(iter(RENAMED))
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_load_and_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load_config(written(tmp_path, dump_config(config))) == config


def test_no_file_gives_the_defaults() -> None:
    assert load_config(None) == RunConfig()


def test_dump_names_every_key() -> None:
    dumped = flatten(yaml.safe_load(dump_config(RunConfig())))
    assert dumped.keys() == flatten(config_to_dict(RunConfig())).keys()
    assert {"name", "data.batch_size", "loss.paat.mode", "optim.betas"} <= dumped.keys()


@settings(max_examples=50, deadline=None)
@given(lr=st.floats(1e-300, 1e300), beta=st.floats(0, 1, exclude_max=True), name=st.text(max_size=20))
def test_round_trip_is_exact(lr: float, beta: float, name: str) -> None:
    config = RunConfig(name=name, optim=OptimConfig(lr=lr, betas=(beta, 0.5)))
    assert config_from_dict(yaml.safe_load(dump_config(config)), "test") == config


@pytest.mark.parametrize("name", ["yes", "no", "null", "1e5", "2024-01-01", "", "~", "1_000", "a: b", "0x1F"])
def test_text_that_looks_like_another_type_survives(tmp_path: Path, name: str) -> None:
    config = RunConfig(name=name)
    assert load_config(written(tmp_path, dump_config(config))) == config


def test_overrides_are_yaml_and_win(tmp_path: Path) -> None:
    path = written(tmp_path, "train: {steps: 7}\n")
    config = load_config(
        path,
        [
            "train.steps=9",
            "optim.lr=1e-3",
            "genes.held_out=[KRT14, TP53]",
            "data.sections_per_batch=null",
            "name=trial",
            "data.shards=a=b",
        ],
    )
    assert (config.train.steps, config.optim.lr, config.name) == (9, 1e-3, "trial")
    assert config.genes.held_out == ("KRT14", "TP53")
    assert config.data.sections_per_batch is None
    assert config.data.shards == "a=b"


def test_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, "optim: {lr: 1e-3, weight_decay: 1, final_lr: 5e-2}\n")
    assert load_config(path).optim == OptimConfig(lr=1e-3, weight_decay=1.0, final_lr=0.05)


def test_an_empty_group_or_file_means_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "optim:\n  # lr: 1\ntrain:\n"), ["train.steps=3"]).train.steps == 3
    assert load_config(written(tmp_path, "# nothing\n")) == RunConfig()
    assert load_config(written(tmp_path, "vision:\n  vit:\n    # depth: 2\n")) == RunConfig()


def test_an_override_of_a_group_with_an_alias_changes_this_group_only(tmp_path: Path) -> None:
    path = written(tmp_path, "optim: {text: &part {lr_scale: 2.0}, heads: *part}\n")
    optim = load_config(path, ["optim.heads.lr_scale=3.0"]).optim
    assert (optim.text.lr_scale, optim.heads.lr_scale) == (2.0, 3.0)


def test_an_override_below_a_value_names_what_holds_the_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps is a value, not a group of keys; write train.steps=VALUE"):
        load_config(None, ["train.steps.deep=3"])
    with pytest.raises(
        ConfigError, match="optim already has the value 5, but must be a group of keys; remove this value"
    ):
        load_config(written(tmp_path, "optim: 5\n"), ["optim.lr=1"])


@pytest.mark.parametrize(("stage", "fix"), [(0, "not 0"), (1, "not 1; or set engine.offload_optimizer=cpu")])
def test_offloading_to_nvme_names_a_stage_that_works(stage: int, fix: str) -> None:
    items = ["engine.kind=deepspeed", "engine.offload_optimizer=nvme", f"engine.zero_stage={stage}"]
    with pytest.raises(ConfigError, match=f"engine.offload_optimizer=nvme: needs engine.zero_stage=3, {fix}$"):
        load_config(None, items)


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("train: {stepz: 3}", "train.stepz", "train.steps"),
        ("trian: {steps: 3}", "trian", "train"),
        ("lr: 0.1", "lr", "optim.lr"),
        ("loss: {paat: {stratta: 3}}", "loss.paat.stratta", "loss.paat.strata"),
        ("train: {batch_size: 3}", "train.batch_size", "data.batch_size"),
    ],
)
def test_unknown_key_names_file_key_and_nearest(tmp_path: Path, text: str, key: str, nearest: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: unknown key {key}; did you mean {nearest}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: 2", "unknown key 1; choose one of name, version, data, genes"),
        ("train.steps: 3", "unknown key train.steps; in a file, write it as `train: {steps: VALUE}`"),
        (
            "genes: {per_task: 3, per_cohort: 4}",
            f"{FORMER} is the former name of genes.per_cohort, and both are given; remove {FORMER}",
        ),
    ],
)
def test_a_key_without_a_similar_one_gets_the_fix_of_its_case(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    "item",
    [
        "train.steps=true",
        "train.steps='5'",
        "train.steps=2.5",
        "train.steps=[1]",
        "train.steps=null",
        "optim.lr='1'",
        "name=5",
        "data.flips=1",
        "genes.held_out=KRT14",
        "optim.betas=[0.9]",
        "optim.betas=[0.9,0.9,0.9]",
        "loss.paat.mode=foo",
        "train.device=gpu",
        "optim.lr=x",
    ],
)
def test_wrong_type_is_refused_by_key(item: str) -> None:
    with pytest.raises(ConfigError, match=item.split("=", maxsplit=1)[0].replace(".", r"\.")) as caught:
        load_config(None, [item])
    assert "given" in str(caught.value)


@pytest.mark.parametrize(
    "item",
    [
        "data.batch_size=1",
        "data.sections_per_batch=0",
        "data.views=0",
        "data.jitter=-1",
        "genes.min_detection=1.5",
        "genes.per_cohort=-1",
        "genes.held_out_every=1",
        "panel.min_genes=0",
        "panel.max_genes=0",
        "panel.variable_share=2",
        "levels.n_levels=2",
        "levels.n_levels=257",
        "levels.min_positive=0",
        "vision.patch_px=0",
        "vision.width=0",
        "vision.depth=0",
        "vision.heads=0",
        "vision.heads=7",
        "vision.mask_ratio=0",
        "vision.mask_ratio=1",
        "vision.ema_decay=2",
        "text.heads=3",
        "text.heads=0",
        "text.max_tokens=0",
        "text.identity_drop=-0.1",
        "align.dim=1",
        "align.temperature=0",
        "align.max_scale=0",
        "loss.nce=-1",
        "loss.paat.candidates=0",
        "loss.paat.strata=0",
        "loss.paat.min_level_shift=0",
        "optim.lr=0",
        "optim.lr=.inf",
        "optim.lr=.nan",
        "optim.weight_decay=-1",
        "optim.betas=[1, 0.9]",
        "optim.betas=[0.9, .nan]",
        "optim.warmup_steps=-1",
        "optim.final_lr=2",
        "optim.clip=-1",
        "train.steps=0",
        "train.log_every=0",
        "train.checkpoint_every=0",
        "train.keep_checkpoints=0",
        "train.validate_every=-1",
        "train.patience=-1",
        "train.max_skips=-1",
        "train.threads=-1",
        "train.seed=-1",
    ],
)
def test_invalid_values_are_refused_by_key(item: str) -> None:
    with pytest.raises(ConfigError, match=item.split("=", maxsplit=1)[0].replace(".", r"\.")):
        load_config(None, [item])


@pytest.mark.parametrize(
    ("items", "key"),
    [
        (["data.batch_size=96", "data.slots=64", "data.sections_per_batch=null"], "data.batch_size"),
        (["data.batch_size=128", "data.slots=64", "data.sections_per_batch=96"], "data.sections_per_batch"),
    ],
)
def test_slots_must_divide_a_batch(items: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: [0-9]+; must be.* multiple of data.slots"):
        load_config(None, items)


def test_all_weights_zero_leaves_nothing_to_learn() -> None:
    with pytest.raises(ConfigError, match="nothing to learn"):
        load_config(None, ["loss.nce=0", "loss.mfm=0", "loss.pair=0", "loss.level=0"])


def test_validate_checks_a_config_built_in_python() -> None:
    validate(RunConfig())
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        validate(replace(RunConfig(), optim=OptimConfig(lr=-1.0)))


@pytest.mark.parametrize("version", ["2", "0", "'1'", "one"])
def test_other_version_is_refused_by_name(tmp_path: Path, version: str) -> None:
    with pytest.raises(ConfigError, match=r"config version .* reads version 1"):
        load_config(written(tmp_path, f"version: {version}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected keys and values, found list"),
        ("train: {steps: 3\n", "not YAML: .*line"),
        ("train: {steps: 3}\ntrain: {seed: 1}\n", "duplicate key.*line 2"),
        ("name: !!python/object/apply:os.system ['true']\n", "not YAML"),
        ("optim: 3\n", "optim is a group of keys"),
        (
            "train: {steps: 3}\n---\ntrain: {}\n",
            "expected a single document in the stream, but found another document .line 2",
        ),
        ("name: a\x00b\n", "character 8 of the text"),
        ("train: {steps: !!int abc}\n", "a tag .* does not fit its value"),
        ("train: {steps: !!timestamp 2020-01-01}\n", "train.steps: values of type date are not supported; use numbers"),
        ("[" * 3000, "nested too deeply"),
        ("vision: {pixel_mean: [0.5]}\n", r"vision.pixel_mean: must be a list of 3 values .given: \[0.5\]"),
        ("watch: {trace: [1, 2, 3]}\n", "watch.trace: must be a list of 2 values"),
        ("genes: {held_out: EPCAM}\n", "genes.held_out: must be a list"),
        ("name: 2020\n", "name: must be text; put it in YAML quotes"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="a folder or device"):
        load_config(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(tmp_path / "b.yaml")


@pytest.mark.parametrize("item", ["train.steps", "=3", "train.steps.deep=3", "name={a: 1"])
def test_bad_overrides_are_shown(item: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_config(None, [item])
