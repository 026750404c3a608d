"""A config states its tile; training on another set is refused by name, before any slow work."""

import logging
import re
from pathlib import Path

import pytest
import yaml
from comtip_shards import ShardSet

from comtip_fast.cli import main
from comtip_fast.config.io import load_config
from comtip_fast.data.expected_tile import check_expected_tile

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("stated", [["data.tile_px=64"], ["data.tile_um=112"], ["data.tile_px=32", "data.tile_um=225"]])
def test_another_tile_is_refused_with_the_fix(
    tiny_overrides: list[str], tiny_shards: ShardSet, tmp_path: Path, stated: list[str], capsys
):
    sets = [x for key in [*tiny_overrides, *stated] for x in ("--set", key)]
    (tmp_path / "run.yaml").write_text("name: tile\n", encoding="utf-8")
    assert main(["pretrain", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), *sets]) == 2
    error = capsys.readouterr().err
    assert f"{tiny_shards.path}: tiles of 224 um in 32 px, but the config states {' '.join(stated)}" in error
    px = next((s.split("=")[1] for s in stated if "px" in s), "32")
    um = next((s.split("=")[1] for s in stated if "um" in s), "224")
    assert f"build the set again with --tile-um {um} --tile-px {px}, or" in error
    assert "--set data.tile_px=32 --set data.tile_um=224" in error


def test_the_stated_tile_is_accepted_and_an_unstated_one_is_not_checked(
    tiny_overrides: list[str], tiny_shards: ShardSet, caplog: pytest.LogCaptureFixture
):
    for stated in ([], ["data.tile_px=32", "data.tile_um=224"]):
        check_expected_tile(load_config(None, [*tiny_overrides, *stated]), tiny_shards)
    vit = [*tiny_overrides, "vision.backbone=vit_base_patch32_224"]
    with caplog.at_level(logging.WARNING, "comtip_fast"):
        check_expected_tile(load_config(None, vit), tiny_shards)
    assert "vit_base_patch32_224 was designed for tiles of 224 px" in caplog.text
    caplog.clear()
    check_expected_tile(load_config(None, [*vit, "data.tile_px=32"]), tiny_shards)
    assert not caplog.records


def test_a_remote_set_is_named_by_its_url_and_not_by_its_cache(
    tiny_overrides: list[str], tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tiny_shards, "name", "https://host/set")
    with pytest.raises(ValueError, match=r"^https://host/set: tiles of 224 um"):
        check_expected_tile(load_config(None, [*tiny_overrides, "data.tile_px=64"]), tiny_shards)


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_states_its_tile_next_to_the_build_command(path: Path):
    text = path.read_text(encoding="utf-8")
    data = yaml.safe_load(text)["data"]
    command = re.search(r"^#   (comtip shards build .*)$", text, re.MULTILINE)
    assert command is not None
    assert f"--tile-um {data['tile_um']} --tile-px {data['tile_px']}" in command[1]
    native = re.search(r"backbone: \w+_(\d{3})$", text, re.MULTILINE)
    assert native is None or int(native[1]) == data["tile_px"]


def test_the_documents_build_what_their_config_expects():
    """The last build command before a recipe of a config in ``configs/`` states the tile of that config."""
    checked = 0
    for document in [ROOT / "README.md", ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md"))]:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for recipe in re.finditer(r"comtip pretrain --config configs/(\w+)\.yaml", text):
            builds = re.findall(r"comtip shards build .*", text[: recipe.start()])
            data = yaml.safe_load((ROOT / f"configs/{recipe[1]}.yaml").read_text())["data"]
            assert builds, document
            for option, value in (("--tile-um", data["tile_um"]), ("--tile-px", data["tile_px"])):
                assert re.search(rf"{option} {value}\b", builds[-1]), (document.name, recipe[0], builds[-1])
            checked += 1
    assert checked >= 6


def test_the_plan_takes_the_tile_of_the_config(capsys: pytest.CaptureFixture[str]):
    demo = ["plan", "--config", str(ROOT / "configs/demo_cpu.yaml"), "--gpu", "cpu"]
    main(demo)
    assert "tiles of 128 px" in capsys.readouterr().out
    assert main([*demo, "--tile-px", "224"]) == 2
    assert "--tile-px 224: the config states data.tile_px=128; leave one of them out" in capsys.readouterr().err
