"""Training on several shard sets that one config names: exact, resumable, and with weights by set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comtip_shards import ShardError, ShardSet, open_sets
from comtip_shards.builder.build import build_shards
from comtip_shards.builder.merge import merge_sets
from comtip_shards.sampling.balance import group_shares
from comtip_shards.sources import open_source
from safetensors.torch import load_file

from comtip_fast import evaluate
from comtip_fast.config.io import ConfigError, config_from_dict, config_to_dict, load_config
from comtip_fast.data.records import SpotReader
from comtip_fast.evaluation.trained import TrainOptions
from comtip_fast.evaluation.trained import fit as trained_fit
from comtip_fast.lineage import Lineage
from comtip_fast.training.checkpoint.content import CheckpointError
from comtip_fast.training.checkpoint.run_state import changed_inputs
from comtip_fast.training.checkpoint.set_changes import SETS as SETS_KEY
from comtip_fast.training.checkpoint.set_changes import changed_sets
from comtip_fast.training.export_checkpoint import export_checkpoint
from comtip_fast.training.protocol import TrainingError
from comtip_fast.training.task import build_task
from comtip_fast.training.trainer import Trainer
from testkit.tiny import TinySection, write_tiny_source
from tests.conftest import TINY

SETS = (
    (TinySection("t1", "donor_a", "train"), TinySection("v1", "donor_v", "val")),
    (TinySection("t2", "donor_b", "train"), TinySection("x1", "donor_x", "test")),
)
SETTINGS = [*TINY, "train.steps=4", "train.validate_every=4", "train.device=cpu", "data.batch_size=16"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return two sets, the second with a larger section, and the set that a merge of them writes."""
    folder = tmp_path_factory.mktemp("sets")
    for i, sections in enumerate(SETS):
        source = write_tiny_source(folder / f"source{i}", sections, side=5 + 2 * i, seed=i).parent
        build_shards(open_source(source), folder / str(i), tile_px=32, tile_um=224.0, min_mpp=5.0)
    merge_sets([folder / "0", folder / "1"], folder / "merged")
    return folder / "0", folder / "1", folder / "merged"


def fit(folder: Path, shards: str, *more: str, resume: bool = False) -> list[float]:
    """Train, and return the losses."""
    config = load_config(None, [*SETTINGS, f"data.shards={shards}", *more])
    Trainer(build_task(config, torch.device("cpu")), config, folder).fit(resume=resume)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_a_run_on_several_sets_is_that_on_the_merged_set(sets: tuple[Path, Path, Path], tmp_path: Path) -> None:
    both = f"[{sets[0]}, {sets[1]}]"
    whole = fit(tmp_path / "merged", str(sets[2]))
    assert fit(tmp_path / "joined", both) == whole
    ours, theirs = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("joined", "merged"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    # A longer run resumes from it; the sets in another order are other data.
    with pytest.raises(TrainingError, match=rf"changed: shards \(the order of the sets was {sets[0]}, {sets[1]}\)"):
        fit(tmp_path / "joined", f"[{sets[1]}, {sets[0]}]", "train.steps=6", resume=True)
    # A set that has moved is the same set.
    moved = shutil.copytree(sets[0], tmp_path / "moved")
    assert len(fit(tmp_path / "joined", f"[{moved}, {sets[1]}]", "train.steps=5", resume=True)) == 5
    assert len(fit(tmp_path / "joined", both, "train.steps=6", resume=True)) == 6
    assert export_checkpoint(tmp_path / "joined", "newest", tmp_path / "out") == 6
    digests = tuple(ShardSet(path).manifest.digest for path in sets[:2])
    assert Lineage.load(tmp_path / "out" / "lineage.json").own.sets == digests
    with pytest.raises(CheckpointError, match=rf"shards \(the set of the checkpoint that was {sets[0]} is missing\)"):
        export_checkpoint(tmp_path / "joined", "newest", tmp_path / "other", sets[1])
    scores = evaluate(tmp_path / "joined", sets[1], null_draws=0).metrics
    assert scores["reference_sections"] == ["t1", "t2"]


def test_a_changed_set_is_named() -> None:
    def shown(then: str, now: str, names_then: str = "a b", names_now: str = "a b") -> str:
        prints = [{"shards": "joined " + digests, SETS_KEY: digests} for digests in (then, now)]
        return changed_sets(prints[0], prints[1], names_then.split(), names_now.split())

    assert shown("1 2", "1 3") == "shards (the content of b is not that of the checkpoint)"
    assert shown("1 2", "1", "a b", "a") == "shards (the set of the checkpoint that was b is missing)"
    assert shown("1 2", "2 1") == "shards (the order of the sets was b, a)"
    assert shown("1 2", "1 3", "a b", "a c") == (
        "shards (c is no set of the checkpoint; the set of the checkpoint that was b is missing)"
    )
    # A path that another set has now.
    assert shown("1 2", "1", "a b", "b") == "shards (the set of the checkpoint that was b is missing)"
    assert shown("1 2", "2", "a b", "a") == "shards (the set of the checkpoint that was a is missing)"
    assert shown("1 2 3", "1 2", "a b c", "a c") == "shards (the set of the checkpoint that was c is missing)"
    assert shown("1 2", "1 3", "a b", "b c") == (
        "shards (c is no set of the checkpoint; the set of the checkpoint that was b is missing)"
    )
    assert shown("2", "2 2", "a", "a b") == "shards (a set is given more or less often than in the checkpoint)"
    assert shown("1 2", "3 1 2", "a b", "c a b") == "shards (c is no set of the checkpoint)"
    # A checkpoint of an earlier version has the hash of a single set, or of all sets together.
    assert "content of a" in changed_sets({"shards": "1"}, {"shards": "2", SETS_KEY: "2"}, ["a"], ["a"])
    assert "does not state" in changed_sets({"shards": "1"}, {"shards": "2", SETS_KEY: "2 3"}, ["a", "b"], ["a", "b"])
    assert changed_inputs({"shards": "1"}, {"shards": "1", SETS_KEY: "1"}) == []


def test_sets_have_equal_or_tempered_weight(sets: tuple[Path, Path, Path]) -> None:
    def spots_of_sets(*more: str) -> list[int]:
        config = load_config(None, [*SETTINGS, f"data.shards=[{sets[0]}, {sets[1]}]", *more])
        task = build_task(config, torch.device("cpu"))
        drawn = np.concatenate(task.batches(0))
        task.close()
        section = task.shards.sections_of(drawn)
        return np.bincount([task.shards.set_of_section(int(s)) for s in section]).tolist()

    assert spots_of_sets() == [25, 49]
    assert spots_of_sets("data.balance=set") == [37, 37]
    # sqrt(25), sqrt(49): 5 and 7 twelfths of 74.
    assert spots_of_sets("data.balance=set", "data.balance_temperature=2") == [31, 43]
    assert spots_of_sets("data.balance=set", "data.balance_temperature=2", "data.run=4") == [31, 43]


def test_counts_next_to_a_damaged_record_are_those_of_their_own_set(
    sets: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Records after a damaged one keep their spots, which tell the set whose genes they refer to."""
    copy = shutil.copytree(sets[0], tmp_path / "damaged")
    shards = open_sets([copy, sets[1]])
    shard = shards.manifest.shards[0]
    offsets, sizes = shards.member_ranges(shard)
    data = bytearray((copy / shard.file).read_bytes())
    data[int(offsets[2, 1] + sizes[2, 1] // 2)] ^= 1
    (copy / shard.file).write_bytes(data)
    spots = np.array([0, 2, len(shards) - 1, 1])
    counts, faults = SpotReader(shards, with_counts=True).counts(spots)
    assert [*faults] == [1]
    assert isinstance(faults[1], ShardError)
    assert (counts != ShardSet(sets[2]).counts(spots[[0, 2, 3]])).nnz == 0


@pytest.mark.parametrize("number", [1, 2])
def test_the_config_of_a_method_trained_on_sets_by_weight_is_read_again(
    sets: tuple[Path, Path, Path], number: int
) -> None:
    """A checkpoint of ``comtip evaluate --train`` holds it; a run on two sets may be given the merged one as ``--train-shards``."""
    given = sets[:2] if number == 2 else sets[2:]
    config = load_config(None, [*SETTINGS, f"data.shards=[{sets[0]}, {sets[1]}]", "data.balance=set"])
    reference = SimpleNamespace(shards=open_sets(given))
    found = trained_fit._config(SimpleNamespace(config=config), reference, TrainOptions())
    assert config_from_dict(config_to_dict(found), "a checkpoint").data.shards == tuple(map(str, given))


@pytest.mark.parametrize("sizes", [[1], [3, 3, 1], [1000, 10, 1], [10**9, 1], [7, 7, 7, 7, 7]])
def test_shares_are_between_the_sizes_and_equality(sizes: list[int]) -> None:
    total = sum(sizes)
    assert group_shares(np.array(sizes), 1.0).tolist() == sizes
    equal = group_shares(np.array(sizes), None)
    assert int(equal.max() - equal.min()) <= 1
    for temperature in (1.5, 3.0, 1e6):
        found = group_shares(np.array(sizes), temperature)
        assert int(found.sum()) == total
        assert found.min() >= 0
    assert np.abs(group_shares(np.array(sizes), 1e15) - equal).max() <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.balance=set"], "data.balance: set; needs a list of several sets in data.shards"),
        (["data.balance_temperature=2"], "data.balance_temperature: 2.0; needs data.balance set, organ or platform"),
        (
            ["data.balance=organ", "data.balance_temperature=0.5"],
            "data.balance_temperature: .*greater than or equal to 1",
        ),
        (["data.shards=3"], "data.shards: must be text"),
        (["data.shards=[]"], "data.shards: must be text"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, settings)
