"""ZeRO 3: updates of the EMA teacher and of averaged weights send nothing, and a validation gathers only what it reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from comtip_shards import ShardSet

from testkit.distributed import run_distributed

WORKER = str(Path(__file__).with_name("zero3_worker.py"))
CHECKS = ["teacher", "validation", "average"]


@pytest.mark.parametrize(
    "case",
    [
        "small=vision.target=ema",
        pytest.param("timm=vision.backbone=vit_tiny_patch16_224;optim.freeze=[[genes, 0]]", marks=pytest.mark.nightly),
    ],
)
def test_weights_under_zero_3(case: str, tiny_shards: ShardSet, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    output = run_distributed([WORKER, str(tiny_shards.path), str(tmp_path), case], 2, timeout_s=280, fork=True)
    for check in CHECKS:
        assert all(f"OK {check} {case.partition('=')[0]}\n" in text for text in output)
