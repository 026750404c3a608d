"""Every config in ``configs/`` loads, its header equals the output of ``comtip plan``, and it runs a step."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from comtip_shards import ShardSet

from comtip_fast.cli import main

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
NEEDED = {"demo_cpu", "1gpu", "8xa100", "8xh100", "multinode_h100", "paper_h100"}
COMMAND, INDENT = "# comtip plan ", "#   "
# Only sizes are overridden; the parts of the method and of the engine are those of the config.
SMALL = [
    "data.batch_size=12",
    "data.slots=2",
    "data.views=2",
    "data.workers=0",
    "genes.per_cohort=30",
    "genes.held_out_from=10",
    "genes.held_out_every=4",
    "panel.max_genes=16",
    "panel.min_genes=8",
    "levels.n_levels=5",
    "levels.min_positive=10",
    "text.width=32",
    "text.depth=2",
    "text.heads=2",
    "engine.compile=false",  # a minute of a C++ compiler; test_compiled_blocks counts variants, the nightly test below compiles
    "text.max_tokens=6",
    "align.dim=32",
    "data.tile_px=32",
    "data.tile_um=224",
    "train.steps=1",
    "train.validate_every=0",
    "train.log_every=1",
    "train.device=cpu",
    "train.threads=1",
    "train.precision=fp32",
]
BACKBONE = {
    "vit_base_patch32_224": ["vision.backbone=vit_tiny_patch16_224", "vision.heads=3"],
    "small": ["vision.patch_px=16"],
}


def header(path: Path) -> tuple[list[str], list[str]]:
    """Return the plan arguments in the header of a config, and the lines after them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(COMMAND))
    header_lines = []
    for line in lines[at + 1 :]:
        if not line.startswith(INDENT):
            break
        header_lines.append(line.removeprefix(INDENT))
    return shlex.split(lines[at])[3:], header_lines


def test_all_recipes_are_there():
    assert {p.stem for p in CONFIGS} >= NEEDED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_header_of_a_config_is_the_output_of_the_plan(path: Path, capsys: pytest.CaptureFixture[str]):
    arguments, expected = header(path)
    assert arguments[:2] == ["--config", f"configs/{path.name}"]
    arguments[1] = str(path)
    assert main(["plan", *arguments, "--brief"]) == 0
    assert expected == capsys.readouterr().out.splitlines(), (
        f"{path}: its header is out of date; replace it by the output of `comtip plan ... --brief`"
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_builds_and_takes_a_step(path: Path, tiny_shards: ShardSet, tmp_path: Path):
    text = path.read_text(encoding="utf-8")
    backbone = next(more for name, more in BACKBONE.items() if f"backbone: {name}" in text)
    overrides = [x for key in [*SMALL, *backbone, f"data.shards={tiny_shards.path}"] for x in ("--set", key)]
    command = ["pretrain", "--config", str(path), "--out", str(tmp_path / "run"), *overrides]
    if "kind: deepspeed" not in text:
        assert main(command) == 0
    else:
        # In a separate process: DeepSpeed leaves a process group and other global state.
        code = f"import sys; from comtip_fast.cli import main; sys.exit(main({command!r}))"
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"nce"' in metrics
    assert '"mfm"' in metrics


@pytest.mark.nightly
def test_compiled_blocks_take_a_step(tiny_shards: ShardSet, tmp_path: Path):
    path = next(p for p in CONFIGS if p.stem == "1gpu")
    backbone = next(more for name, more in BACKBONE.items() if f"backbone: {name}" in path.read_text(encoding="utf-8"))
    keys = [*SMALL, *backbone, f"data.shards={tiny_shards.path}", "engine.compile=true"]
    overrides = [x for key in keys for x in ("--set", key)]
    assert main(["pretrain", "--config", str(path), "--out", str(tmp_path / "run"), *overrides]) == 0
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_an_outdated_header_is_detected(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = next(p for p in CONFIGS if p.stem == "8xh100")
    changed = tmp_path / "changed.yaml"
    changed.write_text(path.read_text().replace("batch_size: 8192", "batch_size: 4096"))
    arguments, expected = header(changed)
    arguments[1] = str(changed)
    main(["plan", *arguments, "--brief"])
    assert expected != capsys.readouterr().out.splitlines()
