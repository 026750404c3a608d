"""bf16 gives nearly the same run, compiled blocks exactly the same."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from comtip_fast.config.io import load_config
from comtip_fast.training.engines.base import set_product_precision
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer

STEPS = 6


def run(overrides: list[str], folder: Path, *more: str) -> tuple[Trainer, list[float]]:
    steps = [f"train.steps={STEPS}", "train.validate_every=0", "train.checkpoint_every=100"]
    config = load_config(None, [*overrides, *steps, *more])
    trainer = Trainer(build_task(config, torch.device("cpu")), config, folder)
    trainer.fit()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return trainer, [r["loss"] for r in rows if r["kind"] == "train"]


@pytest.fixture(scope="module")
def plain(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run(tiny_overrides, tmp_path_factory.mktemp("plain"))[1]


def test_bf16_computes_in_bf16_and_keeps_fp32(
    plain: list[float], tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, set[torch.dtype]] = {"linear": set(), "norm": set()}

    def watched(cls: type[nn.Module], name: str) -> None:
        forward = cls.forward

        def call(self: nn.Module, *args: torch.Tensor) -> torch.Tensor:
            out = forward(self, *args)
            seen[name].add(out.dtype)
            return out

        monkeypatch.setattr(cls, "forward", call)

    watched(nn.Linear, "linear")
    watched(nn.LayerNorm, "norm")
    trainer, losses = run(tiny_overrides, tmp_path / "run", "train.precision=bf16")
    assert torch.bfloat16 in seen["linear"]
    assert seen["norm"] == {torch.float32}  # the residual stream
    assert {p.dtype for p in trainer.engine.module.parameters()} == {torch.float32}
    moments = trainer.engine.optimizer_state().values()
    assert {t.dtype for t in moments} == {torch.float32}
    # bf16 has 8 significant bits, a relative error of 1/256; steps diverge slowly.
    assert losses != plain
    assert losses == pytest.approx(plain, rel=0.02)


def test_compiled_blocks_give_the_same_losses(
    plain: list[float], tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled: list[nn.Module] = []

    def trace(self: nn.Module) -> None:
        # aot_eager traces forward and backward with PyTorch operations; compiling with Inductor takes 90 s.
        compiled.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", trace)
    _, losses = run(tiny_overrides, tmp_path / "run", "engine.compile=true")
    assert sorted(type(m).__name__ for m in compiled) == ["PartsBlock", "SentenceBlock"]
    assert losses == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("device", "precision", "set_to"),
    [("cuda", "auto", ["high"]), ("cuda", "bf16", ["high"]), ("cuda", "fp32", []), ("cpu", "bf16", [])],
)
def test_products_of_the_losses_use_tensor_cores_under_bf16(
    device: str, precision: str, set_to: list[str], monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    set_product_precision(load_config(None, [f"train.precision={precision}"]), torch.device(device))
    assert asked == set_to
