"""Lineage: what every run of a chain was trained on reaches scores, split checks, the model card and predictions."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comtip_shards import ShardSet
from comtip_shards.builder.build import build_shards
from comtip_shards.sources import open_source

import comtip_fast
from comtip_fast.evaluation.evaluate import choose_sections, evaluate
from comtip_fast.evaluation.run import evaluate_run
from comtip_fast.export import Bundle, lineage_of
from comtip_fast.export_checks import FIRST_WITH_LINEAGE, HASHED, READOUT, SUMS, ExportError, write_sums
from comtip_fast.inference import Predictor
from comtip_fast.lineage import FILE, Lineage, LineageExtension, LineageRun, LineageSection
from comtip_fast.training.export_checkpoint import export_checkpoint
from testkit.tiny import TinySection, write_tiny_source

TILES = {"tile_px": 32, "tile_um": 224.0, "min_mpp": 5.0}
SHORT = ["train.steps=2", "train.validate_every=2", "train.checkpoint_every=1"]
ALL = [TinySection(f"s{i}", f"donor_{i}", "train") for i in range(4)]


def build(folder: Path, splits: dict[str, str], *, licence: str = "CC0", attribution: str = "none") -> ShardSet:
    """Build a set of some of four sections, which are the same in every set; ids are kept."""
    source = write_tiny_source(folder / "source", ALL, seed=3).parent
    table = (source / "manifest.tsv").read_text().splitlines()
    head = table[0].split("\t")
    rows = [dict(zip(head, line.split("\t"), strict=True)) for line in table[1:]]
    kept = [
        r | {"split": splits[r["sample_id"]], "licence": licence, "attribution": attribution}
        for r in rows
        if r["sample_id"] in splits
    ]
    lines = ["\t".join(head), *("\t".join(str(r[c]) for c in head) for r in kept)]
    (source / "manifest.tsv").write_text("\n".join(lines) + "\n")
    build_shards(open_source(source), folder / "set", **TILES)
    return ShardSet(folder / "set")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    """One set per run of the chain; s0 trains the first run and is a test section of the last one."""
    return {
        "first": build(
            tmp_path_factory.mktemp("a"), {"s0": "train", "s1": "val"}, licence="CC-BY-4.0", attribution="A"
        ),
        "second": build(tmp_path_factory.mktemp("b"), {"s1": "train", "s2": "val"}, attribution="B"),
        "third": build(tmp_path_factory.mktemp("c"), {"s2": "train", "s0": "test", "s3": "test"}, attribution="C"),
    }


@pytest.fixture(scope="module")
def chain(
    sets: dict[str, ShardSet], tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Three runs, each from the weights of the one before. The genes that the last one holds out trained the first one."""
    out = tmp_path_factory.mktemp("chain")
    genes = {
        "first": ["genes.held_out_every=0"],
        "second": ["genes.held_out_every=4"],
        "third": ["genes.held_out_every=3", "genes.held_out=[GAPDH]"],
    }
    runs: dict[str, Path] = {}
    parent: Path | None = None
    for name, shards in sets.items():
        settings = [*tiny_overrides, *SHORT, *genes[name], f"data.shards={shards.path}", f"name={name}"]
        comtip_fast.pretrain(None, out / name, overrides=settings, start_from=parent, device="cpu")
        parent = runs[name] = out / name
    return runs


def test_a_chain_of_three_keeps_sections_genes_licences_and_scores(chain: dict[str, Path], sets: dict[str, ShardSet]):
    lineage = Bundle.load(chain["third"] / "export").lineage
    assert lineage.labels() == ["first", "second", "third"]
    assert lineage.parents_known
    trained = [[s.section_id for s in run.sections if s.split == "train"] for run in lineage.runs]
    assert trained == [["s0"], ["s1"], ["s2"]]
    assert "human:GAPDH" in lineage.runs[0].trained_genes
    assert "human:GAPDH" in lineage.own.held_out_genes
    assert [run.shards for run in lineage.runs] == [s.manifest.digest for s in sets.values()]
    assert set(lineage.licences()) == {"CC-BY-4.0", "CC0"}
    assert lineage.attributions() == ["A", "B", "C"]
    # The first two runs have a validation section, and keep their scores; the last one has none.
    assert [set(run.validation) for run in lineage.runs] == [{"human_breast"}, {"human_breast"}, set()]
    assert lineage.runs[0].gene_scores.keys() == set(lineage.runs[0].trained_genes)
    hashes = [(run / "export" / SUMS).read_text() for run in chain.values()]
    for run, text in zip(lineage.runs, hashes, strict=True):
        assert f"{run.weights}  model.safetensors" in text


def test_a_section_and_a_donor_of_an_ancestor_are_not_new(chain: dict[str, Path], sets: dict[str, ShardSet]):
    result = evaluate(Predictor.load(chain["third"]), sets["third"], sections=["s0", "s3"], n_null=2)
    first, new = (result.metrics["sections"][s] for s in ("s0", "s3"))
    assert first["section_seen_in_training"]
    assert first["section_seen_by"] == ["first"]
    assert first["donor_seen_in_training"]
    assert not new["donor_seen_in_training"]
    assert first["platform"] == new["platform"] != ""
    assert new["platform_seen_by"] == ["first", "second", "third"], "all sets have the same platform"
    assert new["platform_seen_in_training"]
    assert not new["section_seen_in_training"]
    assert result.metrics["lineage"]["parents_known"]
    assert [r["run"] for r in result.metrics["lineage"]["runs"]] == ["first", "second", "third"]
    assert sorted(result.metrics["reference_sections"]) == ["s0", "s2"], "of the own run and of the first one"
    # s1 stopped the first run and trained the second one.
    again = evaluate(
        Predictor.load(chain["third"]), sets["second"], sections=["s1"], train_shards=sets["third"], n_null=2
    )
    entry = again.metrics["sections"]["s1"]
    assert entry["section_seen_by"] == ["second"]
    assert entry["section_stopped_by"] == ["first"]


def test_a_test_section_that_trained_an_ancestor_is_not_chosen(
    chain: dict[str, Path], sets: dict[str, ShardSet], caplog: pytest.LogCaptureFixture
):
    predictor = Predictor.load(chain["third"])
    with caplog.at_level(logging.WARNING, "comtip_fast"):
        assert choose_sections(predictor, sets["third"], None) == [sets["third"].section_number("s3")]
    assert "not scored, because training used them: s0 (by first)" in caplog.text
    with pytest.raises(
        ValueError,
        match=r"no section is left to score, because training used s1 \(by first, second\); s2 \(by second, third\)",
    ):
        choose_sections(predictor, sets["second"], None)


def test_a_renamed_section_of_an_ancestor_is_recognised(chain: dict[str, Path], tmp_path: Path):
    source = write_tiny_source(tmp_path / "source", ALL, seed=3).parent
    table = (source / "manifest.tsv").read_text()
    (source / "manifest.tsv").write_text(
        "\n".join([table.splitlines()[0], table.splitlines()[1].replace("s0\ttiny", "other\telsewhere")]).replace(
            "donor_0", "someone"
        )
        + "\n"
    )
    build_shards(open_source(source), tmp_path / "set", **TILES)
    section = LineageSection.of(ShardSet(tmp_path / "set").manifest.sections[0])
    assert (section.section_id, section.dataset, section.donor) == ("other", "elsewhere", "someone")
    (uses,) = Bundle.load(chain["third"] / "export").lineage.uses([section])
    assert [(use.run, use.split) for use in uses] == [("first", "train"), ("third", "test")]


def test_genes_that_an_ancestor_trained_are_not_unseen(chain: dict[str, Path], sets: dict[str, ShardSet]):
    bundle = Bundle.load(chain["third"] / "export")
    held_out = {g.key for g in bundle.genes if g.held_out}
    by_parents = {k for run in bundle.lineage.ancestors for k in run.trained_genes}
    assert held_out & by_parents
    result = evaluate(Predictor.load(chain["third"]), sets["third"], sections=["s3"], n_null=2)
    data = result.sections[0]
    assert {data.keys[i] for i in data.unseen} == held_out - by_parents
    assert result.metrics["sections"]["s3"]["n_genes_unseen"] == len(held_out - by_parents)
    seen = result.gene_table().set_index("key")["seen"]
    assert (seen[sorted(set(seen.index) & held_out & by_parents)] == "trained with image by a parent").all()


def test_the_model_card_names_all_runs(chain: dict[str, Path]):
    card = (chain["third"] / "export" / "README.md").read_text()
    for text in (
        "| first | s0 | train |",
        "| second | s1 | train |",
        "| third | s2 | train |",
        "- CC-BY-4.0",
        "- A\n- B",
    ):
        assert text in card
    assert "**s0 is a test section of this run, but influenced the weights of first.**" in card
    assert "unknown" not in card


def test_the_report_names_all_runs(chain: dict[str, Path], sets: dict[str, ShardSet], tmp_path: Path):
    evaluate_run(chain["third"], sets["third"].path, tmp_path, sections=["s0"], null_draws=2, device="cpu")
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert "The weights come from 3 runs, each started from the one before: first, then second, then third." in page
    assert "s0 was used to train this model" in page
    assert "(run first)" in page
    assert "donor in the training set" in page
    assert "from a donor that is not in the training set" not in page


def test_predictions_carry_the_lineage(chain: dict[str, Path], sets: dict[str, ShardSet]):
    answer = comtip_fast.load(chain["third"], "cpu").predict(f"{sets['third'].path}:s3", ["GAPDH", "TTN"])
    assert answer.uns["comtip"]["lineage"] == "first > second > third"
    assert answer.uns["comtip"]["training_licences"] == "CC-BY-4.0; CC0"
    assert answer.var["training"].tolist() == ["trained by a parent", "never seen"]


def test_training_warns_of_leakage_from_the_parent(
    chain: dict[str, Path], sets: dict[str, ShardSet], tiny_overrides: list[str], tmp_path: Path, caplog: Any
):
    settings = [*tiny_overrides, *SHORT, "genes.held_out=[GAPDH]", f"data.shards={sets['third'].path}"]
    with caplog.at_level(logging.WARNING, "comtip_fast"):
        comtip_fast.pretrain(None, tmp_path / "run", overrides=settings, start_from=chain["first"], device="cpu")
    assert "section s0 (split test) influenced the weights of first" in caplog.text
    assert "held-out genes were trained by a parent" in caplog.text
    assert "s3" not in caplog.text


def test_an_export_of_an_export_and_of_a_checkpoint_keep_the_lineage(chain: dict[str, Path], tmp_path: Path):
    want = Bundle.load(chain["third"] / "export").lineage
    Bundle.load(chain["third"] / "export").save(tmp_path / "again")
    assert Bundle.load(tmp_path / "again").lineage == want
    # The parents have been moved since: the run folder keeps their lineage.
    run = shutil.copytree(chain["third"], tmp_path / "run")
    config = (run / "config.yaml").read_text().replace(str(chain["second"]), str(tmp_path / "gone"))
    (run / "config.yaml").write_text(config)
    export_checkpoint(run, "newest", tmp_path / "checkpoint")
    found = Bundle.load(tmp_path / "checkpoint").lineage
    assert found.labels() == ["first", "second", "third"]
    assert found.ancestors == want.ancestors
    (run / FILE).unlink()
    export_checkpoint(run, "newest", tmp_path / "unknown")
    assert not Bundle.load(tmp_path / "unknown").lineage.parents_known


def test_a_resumed_run_keeps_its_parents(
    chain: dict[str, Path], sets: dict[str, ShardSet], tiny_overrides: list[str], tmp_path: Path
):
    parent = shutil.copytree(chain["first"] / "export", tmp_path / "parent")
    settings = [*tiny_overrides, *SHORT, f"data.shards={sets['second'].path}", "name=child"]
    comtip_fast.pretrain(None, tmp_path / "run", overrides=settings, start_from=parent, device="cpu")
    shutil.rmtree(parent)
    shutil.rmtree(tmp_path / "run" / "export")
    comtip_fast.pretrain(None, tmp_path / "run", overrides=settings, start_from=parent, resume=True, device="cpu")
    assert Bundle.load(tmp_path / "run" / "export").lineage.labels() == ["first", "child"]


def make_old(folder: Path) -> None:
    """Convert an export to version 2, which has no lineage."""
    (folder / FILE).unlink()
    meta = json.loads((folder / "config.json").read_text())
    meta["version"] = FIRST_WITH_LINEAGE - 1
    (folder / "config.json").write_text(json.dumps(meta))
    write_sums(folder, [n for n in (*HASHED, READOUT) if n != FILE])


def test_an_old_export_loads_with_unknown_parents_and_passes_this_on(
    chain: dict[str, Path], sets: dict[str, ShardSet], tiny_overrides: list[str], tmp_path: Path, caplog: Any
):
    old = shutil.copytree(chain["second"] / "export", tmp_path / "old")
    make_old(old)
    bundle = Bundle.load(old)
    assert not bundle.lineage.parents_known
    assert bundle.lineage.labels() == ["second"]
    assert bundle.lineage.own.trained_genes == tuple(g.key for g in bundle.genes if g.trained)
    assert lineage_of(old) == bundle.lineage
    bundle.save(tmp_path / "new")
    assert not Bundle.load(tmp_path / "new").lineage.parents_known
    assert "**The parents of second are unknown**" in (tmp_path / "new" / "README.md").read_text()
    # Without a fingerprint, sections are compared by id.
    (uses,) = bundle.lineage.uses([LineageSection.of(sets["second"].manifest.sections[0])])
    assert [use.split for use in uses] == ["train"]
    settings = [*tiny_overrides, *SHORT, f"data.shards={sets['third'].path}", "name=child"]
    with caplog.at_level(logging.WARNING, "comtip_fast"):
        comtip_fast.pretrain(None, tmp_path / "run", overrides=settings, start_from=old, device="cpu")
    assert "the lineage of the parent is not known" in caplog.text
    result = evaluate_run(
        tmp_path / "run", sets["third"].path, tmp_path / "scores", sections=["s3"], null_draws=2, device="cpu"
    )
    assert not result.metrics["lineage"]["parents_known"]
    page = " ".join((tmp_path / "scores" / "report.html").read_text().split())
    assert "from a donor that is not in the known training sets" in page
    assert "second was exported without lineage" in page


def edit(folder: Path, change: Any) -> None:
    found = json.loads((folder / FILE).read_text())
    change(found["lineage"])
    (folder / FILE).write_text(json.dumps(found))
    write_sums(folder, (*HASHED, READOUT))


BAD: dict[str, tuple[Any, str]] = {
    "no run": (lambda x: x.update(runs=[]), "no run"),
    "the own run removed": (lambda x: x["runs"].pop(), "the last run and this export differ"),
    "other weights": (lambda x: x["runs"][-1].update(weights="0" * 64), "differ in weights"),
    "a trained section relabelled": (
        lambda x: x["runs"][-1]["sections"][0].update(split="" if x["runs"][-1]["sections"][0]["split"] else "test"),
        "differ in sections",
    ),
    "a gene removed": (
        lambda x: x["runs"][-1].update(trained_genes=x["runs"][-1]["trained_genes"][1:]),
        "differ in trained",
    ),
    "an unknown split": (lambda x: x["runs"][0]["sections"][0].update(split="tset"), r"runs\.0\.sections\.0\.split"),
    "an unknown field": (lambda x: x["runs"][0].update(more=1), r"runs\.0\.more"),
    "a number as a name": (lambda x: x["runs"][0].update(name=3), r"runs\.0\.name"),
    "a bad hash": (lambda x: x["runs"][0].update(shards="zz"), r"runs\.0\.shards"),
    "a bad fingerprint": (lambda x: x["runs"][0]["sections"][0].update(picture="AAAA"), r"picture.*256 bits"),
    "a score that is not finite": (
        lambda x: x["runs"][0]["gene_scores"].update({"human:A": float("nan")}),
        r"gene_scores",
    ),
    "a null": (lambda x: x.update(runs=None), r"lineage\.json: runs"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_edited_lineage_is_refused(case: str, chain: dict[str, Path], tmp_path: Path):
    change, message = BAD[case]
    export = shutil.copytree(chain["third"] / "export", tmp_path / "export")
    if not (export / READOUT).is_file():
        pytest.fail("the fixture has a readout")
    edit(export, change)
    with pytest.raises(ExportError, match=message):
        Bundle.load(export)
    with pytest.raises(ExportError, match=message):
        lineage_of(export)


def test_another_version_is_refused(chain: dict[str, Path], tmp_path: Path):
    export = shutil.copytree(chain["third"] / "export", tmp_path / "export")
    cases = {
        '{"format": "x"}': "format 'x', expected format 'comtip-lineage'; copy the file again",
        '{"format": "comtip-lineage", "version": 9}': "version 9, but .* reads versions 1 to 4; read it with the release",
        "[1]": "a JSON list, expected",
        "{": "not valid JSON",
    }
    for content, message in cases.items():
        (export / FILE).write_text(content)
        write_sums(export, (*HASHED, READOUT))
        with pytest.raises(ExportError, match=message):
            Bundle.load(export)
    # The lineage of a run folder is no part of an export.
    (tmp_path / FILE).write_text("{")
    with pytest.raises(
        ValueError, match=r"not valid JSON .*delete it: the parents are then read from the export that train"
    ):
        Lineage.load(tmp_path / FILE)


def test_a_lineage_is_written_in_the_earliest_version_that_has_its_fields(tmp_path: Path):
    """Earlier releases refuse unknown fields, so a lineage has only those of its version."""
    section = LineageSection(section_id="a", split="train")
    one = LineageRun(name="one", shards="0" * 64, sections=(section,))
    two = LineageRun(name="two", shards="2" * 64, sets=("0" * 64, "1" * 64))
    three = replace(one, sections=(section, replace(section, platform="Visium")))
    adapted = LineageRun(name="x", gene_scores={"human:A": 0.5}, scored_on={"human:A": "test spots of s"})
    added = replace(two, extensions=(LineageExtension(step=3, sets=("1" * 64,)),))
    chains = [Lineage(runs=runs) for runs in ((one,), (one, two), (three, one), (one, adapted), (three, added))]
    found = [json.loads(lineage.to_json()) for lineage in chains]
    assert [f["version"] for f in found] == [1, 2, 3, 3, 4]
    runs = [run for f in found for run in f["lineage"]["runs"]]
    named = [[name for name in ("sets", "scored_on", "extensions") if name in run] for run in runs]
    assert named == [[], [], ["sets"], [], [], [], ["scored_on"], [], ["sets", "extensions"]]
    sections = [s for run in runs for s in run["sections"]]
    assert ["platform" in s for s in sections] == [False, False, False, True, False, False, False, True]
    for lineage in chains:
        (tmp_path / FILE).write_text(lineage.to_json())
        assert Lineage.load(tmp_path / FILE) == lineage


def test_a_platform_is_new_only_if_all_training_sections_have_another():
    def chain(*platforms: str, known: bool = True) -> Lineage:
        sections = [LineageSection(section_id=f"s{i}", split="train", platform=p) for i, p in enumerate(platforms)]
        test = LineageSection(section_id="t", split="test", platform="Xenium")
        runs = tuple(LineageRun(name=f"r{i}", sections=(s, test)) for i, s in enumerate(sections))
        return Lineage(runs=runs, parents_known=known)

    assert chain("Visium", "ST").runs_that_trained_on_platform("visium ") == ["r0"]
    assert chain("Visium", "ST").runs_that_trained_on_platform("Xenium") == [], "a test section trains nothing"
    assert chain("Visium", "").runs_that_trained_on_platform("Xenium") is None, "a platform is unknown"
    assert chain("Visium", "").runs_that_trained_on_platform("Visium") == ["r0"]
    assert chain("Visium", known=False).runs_that_trained_on_platform("Xenium") is None
    assert chain("Visium").runs_that_trained_on_platform("") is None


def test_equal_names_get_a_position():
    lineage = Lineage(runs=(LineageRun(name="run"), LineageRun(name="b"), LineageRun(name="run")))
    assert lineage.labels() == ["run (1 of 3)", "b", "run (3 of 3)"]


def test_merged_sections_have_their_strongest_use():
    a, b = (LineageSection(section_id=s, dataset="d", donor=f"donor_{s}", split="test") for s in "ab")
    lineage = Lineage(
        runs=(
            LineageRun(name="x", sections=(replace(a, split="train"), b)),
            LineageRun(name="y", sections=(a, replace(b, split="val"))),
        )
    )
    assert [(s.section_id, s.split) for s in lineage.merged_sections()] == [("a", "train"), ("b", "val")]
    assert lineage.runs_that_trained_on("donor_a") == ["x"]
    assert lineage.runs_that_trained_on("donor_b") == []
