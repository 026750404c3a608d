"""A run that resumes with further shard sets: exact, with the genes and levels of its first sets, and recorded in its lineage."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from comtip_shards import ShardSet, open_sets
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import open_source

from comtip_fast import evaluate
from comtip_fast.config.io import load_config
from comtip_fast.lineage import Lineage
from comtip_fast.pretraining import pretrain
from comtip_fast.training.checkpoint.content import sha256_of
from comtip_fast.training.checkpoint.resume import first_sets_of
from comtip_fast.training.checkpoint.run_state import changed_inputs
from comtip_fast.training.checkpoint.set_changes import FIRST, SETS, further_sets
from comtip_fast.training.export_checkpoint import export_checkpoint
from comtip_fast.training.protocol import TrainingError
from comtip_fast.training.task import CoMTIPTask, build_task
from testkit.distributed import run_distributed
from testkit.tiny import SYMBOLS, TinySection, write_tiny_source
from tests.comtip_fast.further_sets_worker import Killed, record_and_kill
from tests.conftest import TINY

WORKER = Path(__file__).with_name("further_sets_worker.py")
A = (
    TinySection("t1", "donor_a", "train"),
    TinySection("v1", "donor_v", "val"),
    TinySection("x1", "donor_x", "test"),
)
B = (TinySection("t2", "donor_b", "train"), TinySection("v2", "donor_w", "val"))
C = (TinySection("t3", "donor_c", "train"),)
OTHER = {"GAPDH": "ACTB", "FTH1": "ALB"}
"""Genes that set b does not have, and the genes that it has instead."""
NEVER = 10**6
STEPS = 9
Seen = dict[int, tuple[int, list[int]]]
"""{step: epoch and spots}."""


def write_set(
    folder: Path,
    sections: tuple[TinySection, ...],
    *,
    side: int = 5,
    seed: int = 0,
    px: int = 32,
    tissue: str = "",
    **rename: str,
) -> Path:
    """Write a tiny set in which some genes have other symbols, under another licence if there are any; ``tissue`` is that of all sections."""
    table = write_tiny_source(folder / "source", sections, side=side, seed=seed)
    if tissue:
        pd.read_csv(table, sep="\t").assign(tissue=tissue).to_csv(table, sep="\t", index=False)
    if rename:
        for section in sections:
            path = folder / "source" / f"{section.section_id}.tsv.gz"
            pd.read_csv(path, sep="\t", index_col=0).rename(columns=rename).to_csv(path, sep="\t")
        table.write_text(table.read_text().replace("CC0", "CC-BY-4.0"))
    build_shards(open_source(table.parent), folder / "set", tile_px=px, tile_um=224.0, min_mpp=5.0)
    return folder / "set"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("further")
    return [
        write_set(folder / "a", A, seed=1),
        write_set(folder / "b", B, side=6, seed=2, **OTHER),
        write_set(folder / "c", C, side=4, seed=3),
    ]


def settings(shards: list[Path], *more: str) -> list[str]:
    own = ["data.batch_size=16", f"train.steps={STEPS}", "train.checkpoint_every=3", "train.validate_every=0"]
    return [*TINY, *own, "train.keep_checkpoints=9", f"data.shards=[{','.join(map(str, shards))}]", *more]


def train(folder: Path, shards: list[Path], *more: str, end: int = NEVER, resume: bool = True) -> Seen:
    """Train, and return what each step was trained on; the run is killed when step ``end`` begins."""
    seen: Seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CoMTIPTask, "batch", record_and_kill(seen, end))
        try:
            pretrain(None, folder, overrides=settings(shards, *more), resume=resume, device="cpu")
        except Killed:
            assert end != NEVER
    return seen


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [*range(1, STEPS + 1)]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def weights(export: Path) -> str:
    return sha256_of(export / "model.safetensors")


@pytest.fixture(scope="module")
def whole(sets: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """Return a finished run on the first set alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(folder, sets[:1])


@pytest.fixture(scope="module")
def begun(sets: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same run, killed with a checkpoint of step 3, in the middle of epoch 1."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    train(folder, sets[:1], end=4)
    return folder


@pytest.fixture(scope="module")
def extended(sets: list[Path], begun: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """Return the run of :func:`begun` with set b from step 4 and set c from step 7 on."""
    folder = shutil.copytree(begun, tmp_path_factory.mktemp("extended") / "run")
    seen = train(folder, sets[:2], end=7)
    return folder, seen | train(folder, sets)


def test_a_killed_extended_run_is_the_uninterrupted_one(
    sets: list[Path], begun: Path, extended: tuple[Path, Seen], whole: tuple[Path, Seen], tmp_path: Path
) -> None:
    folder, expected = extended
    killed = shutil.copytree(begun, tmp_path / "killed")
    seen: Seen = {}
    # Before the first checkpoint with the set, after one in the middle of its first epoch, and the same for the second extension.
    for end, shards in ((4, sets[:2]), (6, sets[:2]), (7, sets[:2]), (7, sets), (9, sets), (NEVER, sets)):
        part = train(killed, shards, "train.checkpoint_every=1", end=end)
        assert all(seen.get(step, part[step]) == part[step] for step in part)
        seen |= part
    assert seen == expected
    assert losses(killed) == losses(folder)
    # Steps before the extension are those of the run on the first set alone, later ones are not.
    alone = losses(whole[0])
    assert [a == b for a, b in zip(alone, losses(folder), strict=True)] == [True] * 3 + [False] * 6
    assert weights(killed / "export") == weights(folder / "export")


def test_an_epoch_over_all_sets_begins_at_the_extension(
    sets: list[Path], extended: tuple[Path, Seen], whole: tuple[Path, Seen]
) -> None:
    folder, seen = extended
    # 25, 36 and 16 training spots in batches of 16.
    assert [whole[1][step][0] for step in range(1, 5)] == [0, 0, 1, 1]
    assert [seen[step][0] for step in range(4, 10)] == [2, 2, 2, 3, 3, 3]
    joined = open_sets(sets)
    sections = [joined.manifest.sections[s].section_id for s in joined.sections_of(seen[4][1])]
    assert set(sections) == {"t1", "t2"}
    epoch = np.concatenate([seen[step][1] for step in (4, 5, 6)])
    assert np.unique(epoch).size == epoch.size
    state = json.loads((folder / "checkpoints" / "step_00000009" / "state.json").read_text())
    digests = [ShardSet(path).manifest.digest for path in sets]
    assert state["extensions"] == [
        {"step": 3, "epoch": 2, "sets": [digests[1]]},
        {"step": 6, "epoch": 3, "sets": [digests[2]]},
    ]
    assert state["fingerprint"][FIRST] == digests[0]
    assert state["fingerprint"][SETS].split() == digests


def test_genes_and_levels_remain_those_of_the_first_set(extended: tuple[Path, Seen], whole: tuple[Path, Seen]) -> None:
    for name in ("genes.tsv", "levels.safetensors"):
        ours, theirs = (sha256_of(run / "export" / name) for run, _ in (extended, whole))
        assert ours == theirs, name


def test_the_export_records_the_further_sets(sets: list[Path], extended: tuple[Path, Seen], tmp_path: Path) -> None:
    folder, _ = extended
    own = Lineage.load(folder / "export" / "lineage.json").own
    assert [(s.section_id, s.split) for s in own.sections] == [
        ("t1", "train"),
        ("v1", "val"),
        ("x1", "test"),
        ("t2", "train"),
        ("v2", ""),
        ("t3", "train"),
    ]
    digests = tuple(ShardSet(path).manifest.digest for path in sets)
    assert own.sets == digests
    assert [(e.step, e.sets) for e in own.extensions] == [(3, digests[1:2]), (6, digests[2:])]
    assert Lineage.load(folder / "export" / "lineage.json").licences() == ["CC-BY-4.0", "CC0"]
    card = (folder / "export" / "README.md").read_text()
    assert "further shard sets: 1 from step 4 on, 1 from step 7 on" in card
    assert "CC-BY-4.0" in card
    # An export of an earlier step has the sets of that step, and those of a later one all of them.
    assert export_checkpoint(folder, "9", tmp_path / "nine") == STEPS
    assert Lineage.load(tmp_path / "nine" / "lineage.json").own.extensions == own.extensions
    assert weights(tmp_path / "nine") == weights(folder / "export")
    assert export_checkpoint(folder, "3", tmp_path / "three") == 3
    first = Lineage.load(tmp_path / "three" / "lineage.json").own
    assert ([s.section_id for s in first.sections], first.extensions) == (["t1", "v1", "x1"], ())
    # A section of a further set counts as seen.
    scores = evaluate(folder, sets[1], sections=["t2"], null_draws=0).metrics
    assert scores["sections"]["t2"]["section_seen_in_training"]
    assert scores["sections"]["t2"]["donor_seen_in_training"]


def test_validation_sections_of_further_sets_are_not_used(
    sets: list[Path], begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(begun, tmp_path / "run")
    with caplog.at_level(logging.INFO, logger="comtip_fast"):
        train(folder, sets[:2], end=4)
    assert (
        "1 validation sections of further sets are not used, so that scores of the run can be compared: v2"
        in caplog.text
    )
    assert "epochs are over the spots of all sets; genes and levels remain those of" in caplog.text
    assert "1 training sections, 36 spots; it measured" in caplog.text
    task = build_task(load_config(None, settings(sets[:2])), torch.device("cpu"), first_sets=_digests(sets[:1]))
    scored = [task.shards.manifest.sections[one.section].section_id for one in task.validation_share(lambda what: None)]
    assert scored == ["v1"]


@pytest.mark.slow
def test_two_ranks_extend_a_run_with_the_batches_of_one(
    sets: list[Path], begun: Path, extended: tuple[Path, Seen], tmp_path: Path
) -> None:
    """The first launch extends the run and is killed, the second continues it, both on two ranks."""
    folder, seen = shutil.copytree(begun, tmp_path / "run"), {}
    for end, shards in ((6, sets[:2]), (7, sets[:2]), (NEVER, sets)):
        arguments = [str(WORKER), str(folder), str(end), *settings(shards)]
        outputs = run_distributed(arguments, 2, timeout_s=120, fork=True)
        found = [json.loads(out.splitlines()[-1]) for out in outputs]
        assert found[0] == found[1]
        seen |= {int(step): (epoch, spots) for step, (epoch, spots) in found[0].items()}
    assert seen == extended[1]
    assert losses(folder) == pytest.approx(losses(extended[0]), rel=1e-4)


def _digests(paths: list[Path]) -> tuple[str, ...]:
    return tuple(ShardSet(path).manifest.digest for path in paths)


@pytest.mark.parametrize(
    "more",
    [
        ["data.sections_per_batch=2"],
        ["data.run=4"],
        ["data.slots=2", "data.sections_per_batch=null"],
        ["data.balance=platform"],
        ["data.balance=set"],
        ["panel.balance=none", "data.expression=records"],
    ],
    ids=lambda more: more[0],
)
def test_every_order_of_spots_has_those_of_all_sets(sets: list[Path], more: list[str]) -> None:
    first = 1 if "data.balance=set" not in more else 2
    config = load_config(None, settings(sets, *more))
    task = build_task(config, torch.device("cpu"), first_sets=_digests(sets[:first]))
    spots = np.concatenate(task.batches(2))
    assert spots.size == 25 + 36 + 16
    section = [task.shards.manifest.sections[s].section_id for s in task.shards.sections_of(spots)]
    if config.data.balance == "set":
        assert {one: section.count(one) for one in ("t1", "t2", "t3")} == {"t1": 26, "t2": 26, "t3": 25}
    else:
        assert np.unique(spots).size == spots.size
    batch = task.batch(task.batches(2)[0], 4, 2)
    table = build_task(load_config(None, settings(sets)), torch.device("cpu"), first_sets=_digests(sets[:1]))
    rows = np.searchsorted(table.tables.spots, batch.spot_index.numpy())
    assert table.tables.levels is not None
    if first == 1:
        assert torch.equal(batch.levels, torch.from_numpy(table.tables.levels[rows][:, batch.panel_host]))
    measured = batch.measured[batch.section == 3]
    assert len(measured) == section[:16].count("t2")
    task.close()
    table.close()


def test_tables_do_not_depend_on_the_number_of_extensions(sets: list[Path]) -> None:
    """Appended one by one or together, and read whole or as a sample: spots, levels and strata are the same."""
    cpu, few = torch.device("cpu"), ["levels.fit_spots=100"]
    both = build_task(load_config(None, settings(sets, *few)), cpu, first_sets=_digests(sets[:1])).tables
    one = build_task(load_config(None, settings(sets[:2], *few)), cpu, first_sets=_digests(sets[:1])).tables
    alone = build_task(load_config(None, settings(sets[:1], *few)), cpu).tables
    assert both.levels is not None
    assert one.levels is not None
    assert np.array_equal(both.levels[: len(one.levels)], one.levels)
    assert np.array_equal(one.levels[: alone.spots.size], alone.levels)
    assert torch.equal(both.strata[:5], one.strata)
    assert torch.equal(one.strata[:3], alone.strata)
    assert np.array_equal(both.variance, alone.variance)
    assert np.array_equal(both.balance, alone.balance)


MESSAGES = {
    "a test donor": ((TinySection("n1", "donor_x", "train"),), {}, "donor donor_x is in the test section x1 and in n1"),
    "a validation donor": (
        (TinySection("n1", "donor_v", "train"),),
        {},
        "donor donor_v of training section n1 is that of the run's validation section v1",
    ),
    "a validation donor in other letters": (
        (TinySection("n1", "Donor_V", "train"),),
        {},
        "donor Donor_V of training section n1 is that of the run's validation section v1",
    ),
    "a section of the run": ((TinySection("t1", "donor_q", "train"),), {}, "section t1 is in .* and in "),
    "a copy of the validation section": (
        tuple(TinySection(f"n{i}", f"donor_{i}", "train") for i in range(2)),
        {"seed": 1},
        r"v1 \(split val\) and n1 \(split train\) are duplicates of one section",
    ),
    "another tile": ((TinySection("n1", "donor_n", "train"),), {"px": 16}, "the manifests differ in tile"),
    "nothing to train on": (
        (TinySection("n1", "donor_n", "test"),),
        {},
        "no section has split 'train', so it cannot extend a run; leave it out of data.shards",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_set_that_cannot_extend_the_run_is_refused_by_name(
    sets: list[Path], begun: Path, tmp_path: Path, case: str
) -> None:
    sections, how, message = MESSAGES[case]
    other = write_set(tmp_path / "other", sections, **({"seed": 9} | how))
    before = (begun / "config.yaml").read_text()
    with pytest.raises(ValueError, match=message):
        train(begun, [sets[0], other])
    assert (begun / "config.yaml").read_text() == before


def test_a_set_without_a_trained_gene_is_refused(sets: list[Path], begun: Path, tmp_path: Path) -> None:
    others = dict(zip(SYMBOLS, (f"COL{i}A1" for i in range(4, 4 + len(SYMBOLS))), strict=False))
    other = write_set(tmp_path / "other", (TinySection("n1", "donor_n", "train"),), seed=9, **others)
    with pytest.raises(ValueError, match=r"training section n1 measured none of the \d+ trained genes of the run"):
        train(begun, [sets[0], other])


def test_removed_reordered_and_changed_sets_are_refused(
    sets: list[Path], extended: tuple[Path, Seen], tmp_path: Path
) -> None:
    folder = extended[0]
    add = "further sections can be trained on as sets of their own, appended to data.shards"
    longer = "train.steps=12"
    with pytest.raises(TrainingError, match=rf"the set of the checkpoint that was {sets[2]} is missing.*{add}"):
        train(folder, sets[:2], longer)
    with pytest.raises(TrainingError, match=r"the order of the sets was .*restore it or train into another folder"):
        train(folder, [sets[0], sets[2], sets[1]], longer)
    with pytest.raises(TrainingError, match="the order of the sets was "):
        train(folder, [sets[1], sets[0], sets[2]], longer)
    grown = write_set(tmp_path / "c", (*C, TinySection("t4", "donor_4", "train")), side=4, seed=3)
    with pytest.raises(TrainingError, match=rf"{grown} is no set of the checkpoint.*{add}"):
        train(folder, [*sets[:2], grown], longer)


def test_a_finished_run_is_extended_only_with_more_steps(
    sets: list[Path], whole: tuple[Path, Seen], tmp_path: Path
) -> None:
    folder = shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(TrainingError, match=rf"cannot train on {sets[1]}: .* ended at step 9 by train.steps; raise"):
        train(folder, sets[:2])
    assert [*train(folder, sets[:2], "train.steps=10")] == [10]


def test_the_first_sets_are_those_that_a_readable_checkpoint_states(
    sets: list[Path], extended: tuple[Path, Seen], tmp_path: Path
) -> None:
    assert first_sets_of(tmp_path) == ()
    for path in (extended[0] / "checkpoints").glob("step_*/state.json"):
        copy = tmp_path / path.relative_to(extended[0])
        copy.parent.mkdir(parents=True)
        copy.write_text("{" if "00000009" in str(path) else path.read_text())
    assert first_sets_of(tmp_path) == _digests(sets[:1])


def test_fingerprints_with_further_sets_are_compared() -> None:
    then = {"shards": "1", SETS: "1"}
    two, three = {"shards": "j", SETS: "1 2", FIRST: "1"}, {"shards": "k", SETS: "1 2 3", FIRST: "1"}
    assert further_sets(then, two) == ["2"]
    assert further_sets({"shards": "1"}, two) == ["2"], "a checkpoint of an earlier version"
    assert further_sets(two, three) == ["3"]
    assert (further_sets(two, two), further_sets(two, then), further_sets({"shards": "j"}, three)) == ([], [], [])
    assert further_sets({"shards": "2", SETS: "2"}, two) == []
    assert changed_inputs(then, two) == changed_inputs(two, three) == changed_inputs(two, two) == []
    assert changed_inputs(two, then) == ["shards"]
    # Genes and levels of other sets than those that the run started with.
    assert changed_inputs(two, {"shards": "j", SETS: "1 2"}) == [FIRST]
    assert changed_inputs(two, three | {FIRST: "1 2"}) == [FIRST]
