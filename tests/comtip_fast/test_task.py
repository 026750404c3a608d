"""The training task: every option runs a step, every loss reaches the parts it trains, and results do not depend on impl=."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comtip_kernels import prefer
from comtip_shards import ShardSet
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import open_source

from comtip_fast.config.io import load_config
from comtip_fast.runtime.devices import pick_device
from comtip_fast.training.losses import LossInputs
from comtip_fast.training.task import CoMTIPTask, build_task

CPU = torch.device("cpu")


def make(overrides: list[str], *more: str) -> CoMTIPTask:
    return build_task(load_config(None, [*overrides, *more]), CPU)


def one_step(task: CoMTIPTask, step: int = 1):
    task.module.train()
    losses, numbers = task.losses(task.module, task.batch(task.batches(0)[0], step, 0))
    losses["loss"].backward()
    return losses, numbers


SWITCHES = {
    "all on": ((), {"nce", "mfm", "pair", "level"}),
    "no mfm": (("loss.mfm=0",), {"nce", "pair", "level"}),
    "no nce": (("loss.nce=0",), {"mfm", "pair", "level"}),
    "no pair": (("loss.pair=0",), {"nce", "mfm", "level"}),
    "no level": (("loss.level=0",), {"nce", "mfm", "pair"}),
    "one gene: no pair": (("panel.max_genes=1",), {"nce", "mfm", "level"}),
    "random adversary": (("loss.paat.adversary=random",), {"nce", "mfm", "pair", "level"}),
    "one candidate": (("loss.paat.candidates=1",), {"nce", "mfm", "pair", "level"}),
    "strata": (("loss.paat.mode=strata",), {"nce", "mfm", "pair", "level"}),
    "spots": (("loss.paat.mode=spots",), {"nce", "mfm", "pair", "level"}),
    "text context": (("loss.paat.context=text",), {"nce", "mfm", "pair", "level"}),
    "no hard columns": (("loss.paat.hard_columns=false",), {"nce", "mfm", "pair", "level"}),
    "negatives all": (("align.negatives=all",), {"nce", "mfm", "pair", "level"}),
    "negatives other": (("align.negatives=other_group",), {"nce", "mfm", "pair", "level"}),
    "teacher": (("vision.target=ema",), {"nce", "mfm", "pair", "level"}),
    "cosine": (("vision.distance=cosine",), {"nce", "mfm", "pair", "level"}),
    "global levels": (("levels.kind=global",), {"nce", "mfm", "pair", "level"}),
    "no names": (("text.full_name=false", "text.identity=false"), {"nce", "mfm", "pair", "level"}),
    "all sections": (("data.sections_per_batch=null",), {"nce", "mfm", "pair", "level"}),
    "no stain": (("data.stain=none", "data.views=1"), {"nce", "mfm", "pair", "level"}),
    "stem": (("vision.stem=efficientnet_lite0",), {"nce", "mfm", "pair", "level"}),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_option_runs_a_step(name: str, tiny_overrides: list[str]):
    more, parts = SWITCHES[name]
    task = make(tiny_overrides, "panel.min_genes=1" if "panel.max_genes=1" in more else "panel.min_genes=12", *more)
    losses, numbers = one_step(task)
    assert set(losses) == parts | {"loss"}
    assert all(torch.isfinite(v) for v in losses.values())
    weight = task.config.loss
    total = sum(getattr(weight, part) * float(losses[part].detach()) for part in parts)
    assert float(losses["loss"].detach()) == pytest.approx(total, rel=1e-5)
    assert numbers["scale"] == pytest.approx(1 / 0.07, rel=1e-4)
    gradients = {n: p.grad for n, p in task.module.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(g).all() for g in gradients.values())
    task.after_step(task.module, 1)
    score, per_cohort, _ = task.validate()
    assert np.isfinite(score)
    assert set(per_cohort) == {"human_breast"}


@pytest.mark.parametrize("name", ["all on", "text context", "no hard columns", "one gene: no pair"])
def test_each_loss_part_states_the_inputs_that_its_gradient_reaches(name: str, tiny_overrides: list[str]):
    more, expected = SWITCHES[name]
    task = make(tiny_overrides, "panel.min_genes=1" if "panel.max_genes=1" in more else "panel.min_genes=12", *more)
    batch = task.batch(task.batches(0)[0], 1, 0)
    inputs = LossInputs.of(task.step.encode(task.model.train(), batch))
    parts, _ = task.step.embedding_losses(batch, inputs)
    assert set(parts) == expected - {"mfm"}
    tensors = {k: t for k, t in inputs.tensors().items() if k != "unit"}
    for part in parts.values():
        found = torch.autograd.grad(part.value, list(tensors.values()), allow_unused=True, retain_graph=True)
        assert part.reads == {k for k, gradient in zip(tensors, found, strict=True) if gradient is not None}


def test_each_loss_reaches_the_parts_it_trains(tiny_overrides: list[str]):
    reached = {
        "nce": {"vision.", "genes.", "project_image", "project_text", "pool_query", "log_scale_nce"},
        "mfm": {"vision.", "generator."},
        "pair": {"vision.", "genes.", "pair_head", "project_text", "project_image"},
        "level": {"vision.", "genes.", "project_image", "project_text", "log_scale_level"},
    }
    for part, names in reached.items():
        off = [f"loss.{other}=0" for other in reached if other != part]
        task = make(tiny_overrides, "panel.min_genes=12", *off)
        one_step(task)
        moved = [n for n, p in task.module.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0]
        for name in names:
            assert any(n.startswith(name) for n in moved), (part, name)
        foreign = {"generator."} if part != "mfm" else {"genes.", "pair_head", "project_text"}
        assert not any(n.startswith(f) for n in moved for f in foreign), part


def test_the_loss_and_its_gradients_are_the_same_with_every_impl(tiny_overrides: list[str]):
    """fp64, so that only a wrong formula can differ (Triton kernels: tests/kernels/interpreted/test_model.py)."""
    results = {}
    for wanted in ("reference", "cpu"):
        task = make(tiny_overrides, "panel.min_genes=12")
        task.model.double()
        task.step.log_prior = task.step.log_prior.double()
        with prefer(wanted):
            losses, _ = one_step(task)
        results[wanted] = losses, {n: p.grad for n, p in task.module.named_parameters() if p.grad is not None}
    for part, value in results["reference"][0].items():
        torch.testing.assert_close(results["cpu"][0][part], value, rtol=1e-9, atol=1e-11)
    for name, gradient in results["reference"][1].items():
        torch.testing.assert_close(results["cpu"][1][name], gradient, rtol=1e-7, atol=1e-10)


def test_a_step_can_be_repeated_from_its_number(tiny_overrides: list[str]):
    one, two = make(tiny_overrides), make(tiny_overrides)
    for step in (3, 4):
        a, b = (t.losses(t.module, t.batch(t.batches(1)[1], step, 1))[0] for t in (one, two))
        assert all(torch.equal(a[k], b[k]) for k in a)
    c = one.losses(one.module, one.batch(one.batches(1)[1], 5, 1))[0]
    assert not torch.equal(a["loss"], c["loss"])


def test_a_timm_backbone_trains_on_224_px_tiles(tiny_source: Path, tmp_path: Path, tiny_overrides: list[str]):
    build_shards(open_source(tiny_source), tmp_path / "s", tile_px=224, tile_um=224.0, min_mpp=5.0)
    task = make(
        tiny_overrides,
        f"data.shards={tmp_path / 's'}",
        "vision.backbone=vit_base_patch32_224",
        "data.batch_size=4",
        "data.views=1",
        "panel.min_genes=8",
    )
    losses, _ = one_step(task)
    assert task.model.vision.n_patches == 49
    assert set(losses) >= {"nce", "mfm", "level"}
    assert torch.isfinite(losses["loss"])


def test_validation_reads_validation_sections_only(
    tiny_overrides: list[str], tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
):
    task = make(tiny_overrides)
    asked: set[int] = set()
    real = ShardSet.members

    def members(self, spots, part):
        asked.update(np.asarray(spots).tolist())
        return real(self, spots, part)

    monkeypatch.setattr(ShardSet, "members", members)
    task.validate()
    assert asked == set(tiny_shards.select(split="val").tolist())


def test_devices_are_refused_by_name():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device 'gpu': not a device of PyTorch; use auto, cpu"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no GPU"):
            pick_device("cuda")


def test_a_gpu_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="device cuda:2: no such GPU; PyTorch numbers its GPUs from 0 to 1"):
        pick_device("cuda:2")


def test_describe_names_what_is_trained(tiny_overrides: list[str]):
    task = make(tiny_overrides)
    text = task.describe()
    assert "98 spots" in text
    assert re.search("human_breast: [0-9]+ genes pass genes.min_detection$", text, re.MULTILINE)
    sections = task.shards.manifest.sections
    sections[:] = [replace(s, split="" if s.split == "val" else s.split) for s in sections]
    assert "min_detection; no section of split val, so its scores do not decide when training stops" in task.describe()
