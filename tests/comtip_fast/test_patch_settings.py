"""Patches that do not fit the tile, and masks that hide nothing, are refused at the start and by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comtip_shards import ShardSet

from comtip_fast.config.io import load_config
from comtip_fast.training import task
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # 32 px: 4 patches of 16 px, one of 32 px.
        (["vision.mask_ratio=0.2"], r"vision\.mask_ratio=0\.2 hides none of the 4 patches .*0\.25 hides one"),
        (
            ["vision.patch_px=8", "vision.mask_ratio=0.06"],
            r"none of the 16 patches .*\(0\.063 hides one\)",
        ),  # 1 / 16 is 0.0625
        (
            ["vision.patch_px=32", "vision.mask_ratio=0.9"],
            r"=0\.9 hides none of the 1 patches .*visible\); make patches smaller",
        ),
        (["vision.patch_px=12"], r"vision\.patch_px=12: tiles of 32 px.*set vision\.patch_px to one of 4, 8, 16, 32"),
        (["vision.patch_px=64"], r"vision\.patch_px=64: tiles of 32 px.*`tile_px=64`"),
        (["vision.patch_px=12", "loss.mfm=0"], r"vision\.patch_px=12: "),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_slow(
    settings: list[str], message: str, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
):
    def tables(*_args: object) -> None:
        raise AssertionError("the training tables were computed first")

    monkeypatch.setattr(task, "training_tables", tables)
    with pytest.raises(ValueError, match=message):
        build_task(load_config(None, [*tiny_overrides, *settings]), CPU)


def test_a_backbone_whose_patches_do_not_fit_is_named(tiny_overrides: list[str]):
    more = ["vision.backbone=vit_base_patch14_dinov2"]
    with pytest.raises(
        ValueError, match=r"'vit_base_patch14_dinov2' has patches of 14 px.*set vision\.vit\.patch_px to one of"
    ):
        build_task(load_config(None, [*tiny_overrides, *more]), CPU)


def test_a_mask_of_one_patch_and_no_mask_train(tiny_overrides: list[str], tiny_shards: ShardSet, tmp_path: Path):
    short = ["train.steps=1", "train.validate_every=0", "train.device=cpu"]
    for i, settings in enumerate((["vision.mask_ratio=0.25"], ["vision.mask_ratio=0.2", "loss.mfm=0"])):
        config = load_config(None, [*tiny_overrides, *short, *settings])
        assert Trainer(build_task(config, CPU), config, tmp_path / str(i)).fit().step == 1
