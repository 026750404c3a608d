"""Padding of panels (``engine.panel_sizes``): few shapes, the same on all ranks, and no influence on losses or gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from comtip_shards import ShardSet

from comtip_fast.collectives import SingleProcessGroup
from comtip_fast.config.io import load_config
from comtip_fast.genes.panel_sizes import TokenSizes, padded_genes
from comtip_fast.runtime import devices
from comtip_fast.training import losses
from comtip_fast.training.losses import StepLosses
from comtip_fast.training.task import CoMTIPTask, build_task
from testkit.synthetic_panels import shapes_of, tokens_of

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = ("data.batch_size=24", "data.workers=0", "text.depth=2", "engine.panel_sizes=4", "train.precision=fp32")


@pytest.fixture(scope="module")
def task(tiny_shards: ShardSet, tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> CoMTIPTask:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text("name: tiny\n")
    overrides = [*tiny_overrides, *SIZES, f"data.shards={tiny_shards.path}", "train.device=cpu"]
    built = build_task(load_config(path, overrides), torch.device("cpu"))
    built.model.double()
    built.step.log_prior = built.step.log_prior.double()
    return built


def results(task: CoMTIPTask, step: StepLosses, batch: losses.Batch) -> dict[str, torch.Tensor]:
    """Return the losses of a batch, and the gradients of all parameters."""
    task.model.zero_grad()
    out = step.encode(task.model, batch)
    heads = losses.LossInputs.of(out)
    parts, _ = step.embedding_losses(batch, heads)
    values = step.weighted_total(parts, heads)
    values["loss"].backward()
    grads = {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}
    return {n: v.detach().clone() for n, v in (values | grads).items()}


@pytest.mark.parametrize("n", [1, 5, 11])
@pytest.mark.parametrize("context", ["image", "text"])
def test_padding_changes_no_loss_and_no_gradient(
    task: CoMTIPTask, monkeypatch: pytest.MonkeyPatch, n: int, context: str
):
    monkeypatch.setattr(task.loader, "panel", lambda _section, _step: np.arange(1, 1 + 2 * n, 2))
    object.__setattr__(task.config.loss.paat, "context", context)
    batch = task.batch(task.batches(0)[0], 1, 0)
    assert batch.padding == 0  # on a CPU
    monkeypatch.setattr(devices, "reads_are_free", lambda _device: False)
    plain = results(task, task.step, batch)
    step = StepLosses(task.config, task.genes, task.step.log_prior, task.step.strata, SingleProcessGroup())
    padded = batch.padded(padded_genes(n, 4, 256), task.genes.length_G.shape[0])
    assert (padded.n_genes, padded.panel.numel()) == (n, 16)
    found = results(task, step, padded)
    assert found.keys() == plain.keys()
    assert ("pair" in plain) == (n > 1)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_tokens_are_padded_on_every_rank_to_the_same_number():
    config = load_config(CONFIGS / "8xh100.yaml", ["engine.panel_sizes=4"])
    host = tokens_of(400, config.text, padded=True)
    vocabulary = int(host.ids_GT.max()) + 1
    for rank in range(8):
        own, sizes, added = _rank(host, config.levels.n_levels, vocabulary, rank)
        assert sizes.tokens == _rank(host, config.levels.n_levels, vocabulary, 0)[1].tokens
        known = host.take(np.arange(0, 400, 3)).sizes(config.levels.n_levels, vocabulary, own)
        assert known.genes == sizes.genes
        assert known.names <= sizes.names
        # The added sentences have room for all tokens that padding adds.
        assert known.tokens <= sizes.tokens <= known.tokens + added * host.ids_GT.shape[1]


def _rank(host, n_levels: int, vocabulary: int, rank: int):
    taken = host.take(np.arange(0, 400, 3))
    counts = losses.counts_of(taken.length_G.size * n_levels, 8)
    own = losses.share_of(sum(counts), rank, 8)
    return own, *taken.padded_sizes(n_levels, vocabulary, own, counts)


def test_few_shapes_occur_and_change_together_on_all_ranks():
    config = load_config(CONFIGS / "8xh100.yaml", ["engine.panel_sizes=4"])
    host = tokens_of(500, config.text, padded=True)
    draw = np.random.default_rng(0)
    sizes = np.exp(draw.uniform(0, np.log(500), 300)).astype(int)
    panels = [np.sort(draw.permutation(500)[: max(1, n)]) for n in sizes]
    per_rank = [[shapes_of(host, config, 8, rank)(p) for p in panels] for rank in (0, 3, 7)]
    assert len(set(per_rank[0])) <= 40
    assert {len(set(shapes)) for shapes in per_rank} == {len(set(zip(*per_rank, strict=True)))}


def test_sizes_of_a_panel():
    sizes = sorted({padded_genes(n, 4, 1000) for n in range(1, 1001)})
    assert sizes == [*range(16, 129, 16), 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1000]
    assert all(padded_genes(n, m, 1000) >= n for n in range(1, 1001) for m in (1, 3, 8))
    assert padded_genes(77, 0, 1000) == 77
    assert padded_genes(1200, 4, 1000) == 1200  # a panel that the loader did not draw


def test_tokens_of_a_panel_have_a_bound():
    sizes = TokenSizes(mean=10.0, deviation=3.0, longest=18)
    assert sizes.padded(320, 10, 3000) == sizes.padded(320, 10, 3300)
    assert 3300 <= sizes.padded(320, 10, 3300) < sizes.padded(320, 10, 5000)
    assert sizes.padded(320, 10, 18 * 320) == 18 * 320
    assert TokenSizes(5.0, 0.0, 5).padded(32, 8, 160) == 192
