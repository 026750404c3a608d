"""Shared fixtures: a tiny source, its shard set, a tiny config and a finished run."""

from pathlib import Path

import pytest
import torch
from comtip_shards import ShardSet
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import open_source

from testkit.tiny import write_tiny_source

torch.set_num_threads(1)

TINY = [
    "data.batch_size=32",
    "data.views=2",
    "genes.per_cohort=30",
    "genes.held_out_from=10",
    "genes.held_out_every=4",
    "panel.max_genes=24",
    "levels.n_levels=5",
    "levels.min_positive=10",
    "vision.patch_px=16",
    "vision.width=32",
    "vision.depth=1",
    "vision.heads=2",
    "text.width=32",
    "text.depth=1",
    "text.heads=2",
    "text.max_tokens=6",
    "align.dim=32",
    "optim.warmup_steps=5",
    "train.steps=20",
    "train.validate_every=5",
    "train.checkpoint_every=5",
    "train.log_every=1",
    "train.patience=0",
    "train.threads=1",
]
TILES = {"tile_px": 32, "tile_um": 224.0, "min_mpp": 5.0}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the interpreted kernels first, because the longest file must not begin last; skip nightly tests unless asked."""
    items.sort(key=lambda item: item.path.name != "test_interpreted.py")
    if "nightly" not in (config.getoption("markexpr") or ""):
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="nightly: make nightly, or pytest -m nightly"))


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_source(tmp_path_factory.mktemp("source")).parent


@pytest.fixture(scope="session")
def tiny_shards(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("shards") / "set"
    build_shards(open_source(tiny_source), out, **TILES)
    return ShardSet(out)


@pytest.fixture(scope="session")
def tiny_overrides(tiny_shards: ShardSet) -> list[str]:
    return [*TINY, f"data.shards={tiny_shards.path}"]


@pytest.fixture(scope="session")
def tiny_run(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run on the tiny set."""
    from comtip_fast.config.io import load_config
    from comtip_fast.training.task import build_task
    from comtip_fast.training.trainer import Trainer

    # At twice this rate the sentence table collapses in a third of the seeds (4 of 11, where 1 of 11 did in another order
    # of the same spots), and a test of what was learnt would be a test of luck.
    more = ["train.steps=200", "train.validate_every=40", "optim.lr=1.5e-3", "vision.stem=efficientnet_lite0"]
    config = load_config(None, [*tiny_overrides, *more, "loss.nce=0.5", "loss.mfm=0.3"])
    run = tmp_path_factory.mktemp("run") / "run"
    Trainer(build_task(config, torch.device("cpu")), config, run).fit()
    return run


@pytest.fixture(scope="module")
def quick(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two steps, with a readout."""
    from comtip_fast.config.io import load_config
    from comtip_fast.training.task import build_task
    from comtip_fast.training.trainer import Trainer

    settings = [*tiny_overrides, "train.steps=2", "train.validate_every=0", "train.device=cpu"]
    config = load_config(None, settings)
    folder = tmp_path_factory.mktemp("quick") / "run"
    Trainer(build_task(config, torch.device("cpu")), config, folder).fit()
    return folder
