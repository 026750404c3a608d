"""Between two logged steps the host reads nothing from the device, and a step that is not finite changes nothing there.

CPU tensors stand in for those of a GPU: with ``reads_are_free`` False the step takes the path of a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from comtip_fast.collectives import SingleProcessGroup, counts_of, share_of
from comtip_fast.config.io import load_config
from comtip_fast.genes.tokens import take_genes
from comtip_fast.objectives import PairMetadata, global_infonce
from comtip_fast.runtime import devices
from comtip_fast.training.checkpoint.content import Checkpoint
from comtip_fast.training.checkpoint.reading import HeldReader
from comtip_fast.training.engines.factory import make_engine
from comtip_fast.training.engines.torch import TorchEngine
from comtip_fast.training.optim import make_optimizer, mask_steps, restore_optimizer
from comtip_fast.training.protocol import TrainingError
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer
from testkit.distributed import run_distributed
from testkit.host_reads import HostReads
from testkit.ranks import Rank, Ranks
from tests.comtip_fast.trainer_standin import Net, StandIn, config_of

CPU = torch.device("cpu")
LOADING = "batch"
"""``CoMTIPTask.batch``: records are read, decoded and assembled on the host."""


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "reads_are_free", lambda device: False)


class MaskedStandIn(StandIn):
    """A stand-in whose moving average follows the mask."""

    def after_step(self, module: Net, step: int, good: Tensor | None = None) -> None:
        new = self.module.teacher * 0.9 + self.module.body[0].weight.detach() * 0.1
        self.module.teacher.copy_(new if good is None else torch.where(good, new, self.module.teacher))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("vision.target=ema",),
        ("loss.paat.context=text", "loss.paat.mode=strata"),
        ("engine.micro_batches=2",),
        ("engine.activation_checkpointing=true",),
        ("loss.mfm=0", "loss.paat.adversary=random"),
        ("train.precision=bf16",),
        ("optim.spike.policy=skip", "optim.ema=0.99"),
        ("optim.spike.policy=clip",),
        ("engine.panel_sizes=4",),
    ],
)
def test_a_step_that_logs_nothing_reads_nothing(
    more: tuple[str, ...], tiny_overrides: list[str], tmp_path: Path, like_a_gpu: None, monkeypatch: pytest.MonkeyPatch
):
    steps = ["train.steps=6", "train.log_every=100", "train.validate_every=0", "train.checkpoint_every=100"]
    config = load_config(None, [*tiny_overrides, *steps, *more])
    trainer = Trainer(build_task(config, CPU), config, tmp_path)
    found: dict[int, list[str]] = {}
    one_step = trainer._one_step

    def watched(caught: Any) -> None:
        with HostReads(LOADING) as reads:
            one_step(caught)
        found[trainer.progress.step] = reads.found

    monkeypatch.setattr(trainer, "_one_step", watched)
    trainer.fit()
    assert found.pop(1), "the first step is logged, so it reads"
    assert {step: reads for step, reads in found.items() if reads} == {}


def test_the_masked_path_gives_the_same_run(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(folder: Path) -> list[dict[str, Any]]:
        config = load_config(None, [*tiny_overrides, "train.steps=7", "train.log_every=3", "vision.target=ema"])
        Trainer(build_task(config, CPU), config, folder).fit()
        return [row for row in rows_of(folder / "metrics.jsonl") if row["kind"] == "train"]

    plain = run(tmp_path / "plain")
    monkeypatch.setattr(devices, "reads_are_free", lambda device: False)
    masked = run(tmp_path / "masked")
    assert [row["step"] for row in masked] == [row["step"] for row in plain] == [1, 3, 6]
    for a, b in zip(plain, masked, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"loss", "nce", "mfm", "pair", "level", "grad_norm", "tokens", "genes", "scale"}:
            # Fused AdamW and masked columns round differently.
            assert b[key] == pytest.approx(a[key], rel=1e-4), key


# -- steps that are not finite --------------------------------------------------------------------------------


def run_masked(folder: Path, nan_steps: dict[int, str], *overrides: str) -> MaskedStandIn:
    config = config_of("train.log_every=5", "train.validate_every=0", "train.checkpoint_every=100", *overrides)
    task = MaskedStandIn(config)
    task.nan_steps = nan_steps
    Trainer(task, config, folder).fit()
    return task


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_changes_nothing_and_is_reported_when_read(
    kind: str, tmp_path: Path, like_a_gpu: None, monkeypatch: pytest.MonkeyPatch
):
    states: dict[int, dict[str, Tensor]] = {}
    after = MaskedStandIn.after_step

    def record(self: MaskedStandIn, module: Net, step: int, good: Tensor | None = None) -> None:
        after(self, module, step, good)
        states[step] = {name: t.clone() for name, t in self.module.state_dict().items()}

    monkeypatch.setattr(MaskedStandIn, "after_step", record)
    run_masked(tmp_path, {3: kind, 7: kind}, "train.steps=10", "train.nan_policy=skip")
    for bad in (3, 7):
        assert all(torch.equal(states[bad][name], t) for name, t in states[bad - 1].items())
        assert not all(torch.equal(states[bad + 1][name], t) for name, t in states[bad].items())
    rows = [r for r in rows_of(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert [(r["step"], r["skips"]) for r in rows] == [(1, 0), (5, 1), (10, 2)]
    reports = rows_of(tmp_path / "nonfinite.jsonl")
    order = [spots for epoch in (0, 1) for spots in StandIn(config_of()).batches(epoch)]
    assert [(r["step"], r["spot_index"]) for r in reports] == [(s, order[s - 1].tolist()) for s in (3, 7)]
    assert [r["parts"]["mfm"] is None for r in reports] == [kind == "loss"] * 2
    if kind == "gradient":
        assert all(r["gradients"] == ["body.1.bias"] for r in reports)


def test_stop_names_the_first_bad_step_and_saves_nothing_after_it(tmp_path: Path, like_a_gpu: None):
    with pytest.raises(TrainingError, match=r"^step 7: loss part mfm is not finite"):
        run_masked(tmp_path, {7: "loss", 8: "loss"}, "train.steps=17", "train.checkpoint_every=4")
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir()) if p.is_dir()] == ["step_00000004"]


def test_max_skips_ends_the_run_when_read(tmp_path: Path, like_a_gpu: None):
    bad = dict.fromkeys((2, 3, 4), "loss")
    with pytest.raises(TrainingError, match=r"^step 4: .*more than train.max_skips=2"):
        run_masked(tmp_path, bad, "train.steps=17", "train.nan_policy=skip", "train.max_skips=2")


def test_the_masked_run_with_skips_resumes_to_the_bit(tmp_path: Path, like_a_gpu: None):
    overrides = ("train.steps=12", "train.nan_policy=skip")
    whole = run_masked(tmp_path / "whole", {3: "loss"}, *overrides)
    config = config_of("train.log_every=5", "train.validate_every=0", "train.checkpoint_every=6", *overrides)

    def stop(step: int) -> None:
        if step == 8:
            raise KeyboardInterrupt

    part = MaskedStandIn(config, stop)
    part.nan_steps = {3: "loss"}
    with pytest.raises(KeyboardInterrupt):
        Trainer(part, config, tmp_path / "part").fit()
    again = MaskedStandIn(config)
    Trainer(again, config, tmp_path / "part").fit(resume=True)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], value), name


# -- optimizer ------------------------------------------------------------------------------------------------


def test_a_fused_optimizer_counts_steps_on_the_device_of_its_parameters(like_a_gpu: None):
    config = config_of()
    engine = make_engine(Net(), config, SingleProcessGroup())
    assert isinstance(engine, TorchEngine)
    assert engine.optimizer.defaults["fused"] is True
    meta = Net().to("meta")
    fused = make_optimizer(meta, config.optim)
    fused.defaults["fused"] = True
    shape, name = meta.body[0].weight.shape, "body.0.weight"
    state = {f"{name}/{key}": torch.zeros(shape) for key in ("exp_avg", "exp_avg_sq")} | {
        f"{name}/step": torch.tensor(3.0)
    }
    restore_optimizer(meta, fused, HeldReader(Checkpoint({}, state, {})))
    assert fused.state[meta.body[0].weight]["step"].device.type == "meta"


def test_a_masked_step_changes_neither_weights_nor_moments_nor_the_count():
    net = Net()
    optimizer = make_optimizer(net, config_of().optim, fused=True)

    def step(good: bool) -> list[Tensor]:
        for q in net.parameters():
            q.grad = torch.full_like(q, 1.0 if good else torch.nan)
        mask_steps(optimizer, torch.tensor(good))
        optimizer.step()
        state = [t for q in net.parameters() for t in optimizer.state[q].values()]
        return [t.detach().clone() for t in (*net.parameters(), *state)]

    first, masked, second = step(True), step(False), step(True)
    assert all(torch.equal(a, b) for a, b in zip(first, masked, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(masked, second, strict=True) if a.numel() > 1)


# -- sizes that the host knows --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_sizes_of_the_host_are_those_of_the_tensors(size: int, tiny_overrides: list[str]):
    task = build_task(load_config(None, tiny_overrides), CPU)
    batch = task.batch(task.batches(0)[0], 1, 0)
    assert batch.panel_host is not None
    known = take_genes(task.genes, batch.panel.long(), batch.panel_host)
    read = take_genes(task.genes, batch.panel.long())
    assert known.host is not None
    assert torch.equal(known.ids_GT, read.ids_GT)
    Q, G = task.config.levels.n_levels, len(batch.panel)
    for rank in range(size):
        own = share_of(G * Q, rank, size)
        sizes = known.host.sizes(Q, task.tokenizer.vocab_size, own)
        gene = torch.arange(G * Q)[own] // Q
        assert sizes.tokens == int(read.length_G[gene].sum())
        assert sizes.genes == int(gene.max() - gene.min()) + 1
        names = {
            (int(t), s) for n in gene.unique() for s, t in enumerate(read.ids_GT[n]) if 0 < s < read.length_G[n] - 1
        }
        assert len(names) <= sizes.names < len(names) + 64


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_masked_hard_columns_over_ranks_equal_selected_ones(form: str):
    b, D, world = 5, 8, 2
    g = torch.Generator().manual_seed(1)
    x, y, more = (torch.randn(world * b, D, generator=g, dtype=torch.float64) for _ in range(3))
    use = torch.rand(world * b, generator=g) < 0.5
    text, section = torch.arange(world * b), torch.randint(2, (world * b,), generator=g)
    counts = counts_of(world * b, world)

    def run(masked: bool) -> list[tuple[Tensor, ...]]:
        def work(rank: Rank) -> tuple[Tensor, ...]:
            own = share_of(world * b, rank.rank, world)
            index: Tensor | slice = slice(None) if masked else use[own]
            mask = torch.cat([torch.zeros(b, dtype=torch.bool), ~use[own]]) if masked else None
            leaf = x[own].clone().requires_grad_()
            columns = torch.cat([y[own], more[own][index]])
            classes = torch.cat([text[own], 100 + text[own][index]])
            sections = torch.cat([section[own], section[own][index]])
            pairs = PairMetadata(classes, sections, torch.ones(b), "same_group", mask)
            loss = global_infonce(leaf, columns, torch.tensor(20.0, dtype=torch.float64), pairs, rank, counts, form)
            loss.backward()
            return loss.detach(), leaf.grad

        return Ranks(world).run(work)

    torch.testing.assert_close(run(masked=True), run(masked=False), rtol=1e-12, atol=1e-14)


# -- ranks ----------------------------------------------------------------------------------------------------


def on_two_ranks(folder: Path, overrides: list[str], signal_step: int = 0) -> list[dict[str, Any]]:
    worker = Path(__file__).with_name("masked_worker.py")
    outputs = run_distributed([str(worker), str(folder), ",".join(overrides), str(signal_step)], 2, fork=True)
    return [json.loads(text.strip().splitlines()[-1]) for text in outputs]


def test_ranks_read_nothing_and_give_the_losses_of_one(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    more = ["train.steps=7", "train.log_every=3", "train.validate_every=0", "train.checkpoint_every=100"]
    overrides = [*tiny_overrides, *more]
    ranks = on_two_ranks(tmp_path / "two", overrides)
    assert ranks[0]["reads"] == {"2": [], "4": [], "5": [], "7": []}
    for rank in ranks:  # weights cast a block at a time under DDP: losses and gradients of autocast's own casts
        assert rank["cast_groups"] == [2, 0]  # one block of each encoder
        assert rank["compared"] > 100
        assert rank["same_bits"]
    monkeypatch.setattr(devices, "reads_are_free", lambda device: False)
    config = load_config(None, overrides)
    Trainer(build_task(config, CPU), config, tmp_path / "one").fit()
    two, one = (rows_of(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [r["step"] for r in two] == [r["step"] for r in one] == [1, 3, 6]
    for a, b in zip(two, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_a_stop_request_of_one_rank_stops_all_after_that_step(tiny_overrides: list[str], tmp_path: Path):
    more = ["train.steps=9", "train.log_every=100", "train.validate_every=0", "train.checkpoint_every=100"]
    found = on_two_ranks(tmp_path, [*tiny_overrides, *more], signal_step=4)[0]
    assert (found["step"], found["stopped"]) == (4, "sigterm")
    assert (tmp_path / "checkpoints" / "step_00000004").is_dir()
