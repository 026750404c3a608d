"""ZeRO 3: a model is built and loaded without a rank that holds it whole, and nothing is gathered that is not read."""

from __future__ import annotations

from pathlib import Path

import pytest
from comtip_shards import ShardSet

from testkit.distributed import run_distributed

WORKER = str(Path(__file__).with_name("zero3_worker.py"))
CASES = [
    "small=vision.target=ema",
    "timm=vision.backbone=vit_tiny_patch16_224;optim.freeze=[[genes, 0]]",
]
CHECKS = ["build", "resume", "warm", "teacher", "validation"]


@pytest.fixture(scope="module")
def output(tiny_shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pytest.importorskip("deepspeed")
    folder = str(tmp_path_factory.mktemp("zero3"))
    return run_distributed([WORKER, str(tiny_shards.path), folder, *CASES], 2, timeout_s=280)


@pytest.mark.parametrize("case", [case.partition("=")[0] for case in CASES])
@pytest.mark.parametrize("check", CHECKS)
def test_weights_under_zero_3(check: str, case: str, output: list[str]) -> None:
    assert all(f"OK {check} {case}\n" in text for text in output)
