"""Test data is kept out of the training data."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from comtip_shards import ShardSet, SourceError
from comtip_shards.builder.build import build_shards
from comtip_shards.sections.benchmark import benchmark_of, guard_benchmark, load_benchmark
from comtip_shards.sections.duplicates import SKETCH, check_duplicates, picture_bits, section_fingerprint, spot_hashes
from comtip_shards.sections.facts import SectionFacts
from comtip_shards.sections.leakage import enforce_split_policy
from comtip_shards.sections.section import SectionMeta
from comtip_shards.sections.splits import check_splits, own_donors, propose_split
from comtip_shards.sources import hest, open_source
from PIL import Image
from scipy import sparse

from testkit.tiny import TinySection, write_tiny_source

SIZE = {"tile_px": 32, "tile_um": 224.0, "min_mpp": 5.0}


def meta(section_id: str, donor: str = "", split: str = "", dataset: str = "ours") -> SectionMeta:
    return SectionMeta(
        section_id=section_id,
        dataset=dataset,
        species="human",
        tissue="breast",
        donor=donor,
        platform="Visium",
        licence="",
        attribution="",
        mpp=0.5,
        spot_diameter_um=55,
        spot_pitch_um=100,
        split=split,
    )


def test_the_list_holds_every_task_whole():
    sections = load_benchmark().values()
    scored = Counter(s.task for s in sections if s.role == "scored")
    # Sections per task as published by HEST-Benchmark.
    assert scored == {
        "IDC": 4,
        "PRAD": 23,
        "PAAD": 3,
        "SKCM": 2,
        "COAD": 4,
        "READ": 4,
        "CCRCC": 24,
        "HCC": 2,
        "LUNG": 2,
        "LYMPH_IDC": 4,
    }
    donors = {s.donor for s in sections if s.role == "scored"}
    for other in (s for s in sections if s.role == "same donor"):
        assert other.donor in donors
    assert all(s.known_from and s.donor for s in sections)


@pytest.mark.parametrize(
    ("section", "found"),
    [
        (meta("TENX95"), "TENX95"),
        (meta("tenx95"), "TENX95"),
        (meta("hest_TENX95"), "TENX95"),
        (meta("MEND139.v2", dataset="HEST-1k"), "MEND139"),
        (meta("patient-INT1"), None),
        (meta("TENX950"), None),
        (meta("hest_TENX950"), None),
        (meta("her2st_A1"), None),
    ],
)
def test_ids_are_recognised_whole_or_as_a_word_of_hest(section: SectionMeta, found: str | None):
    hit = benchmark_of(section, load_benchmark())
    assert (hit.id if hit else None) == found


def test_a_benchmark_section_becomes_test_unless_asked_to_train():
    metas, notes = guard_benchmark([meta("TENX95"), meta("mine", split="train")])
    assert [m.split for m in metas] == ["test", "train"]
    assert "benchmark task IDC" in notes["TENX95"]
    for split in ("train", "val"):
        with pytest.raises(SourceError, match=rf"TENX95 \(split {split}\).*IDC.*\n.*`allow_benchmark`"):
            guard_benchmark([meta("TENX95", split=split)])
    metas, notes = guard_benchmark([meta("TENX95", split="train")], allow=["TENX95"])
    assert metas[0].split == "train"
    assert notes["TENX95"].endswith("allowed by name")


def test_sections_of_the_same_specimen_are_kept_out_too():
    with pytest.raises(SourceError, match=r"TENX98 is of a donor of benchmark task IDC.*replicate 2 of TENX99"):
        guard_benchmark([meta("TENX98", split="train")])


def test_a_donor_shared_with_a_benchmark_section_is_kept_out():
    pair = [meta("TENX95", donor="patient 2"), meta("other", donor="patient 2")]
    metas, notes = guard_benchmark(pair)
    assert [m.split for m in metas] == ["test", "test"]
    assert "donor patient 2 is also that of TENX95" in notes["other"]
    with pytest.raises(SourceError, match=r"other \(split train\).*that of TENX95"):
        guard_benchmark([pair[0], replace(pair[1], split="train")])
    # An unknown donor is unique, so it affects no other section.
    metas, _ = enforce_split_policy([meta("TENX95"), meta("other", split="train")])
    assert [m.split for m in metas] == ["test", "train"]
    # Allowed by name, but its donor may still not be in both splits.
    with pytest.raises(SourceError, match=r"donor patient 2 is in the test section other and in TENX95"):
        enforce_split_policy([replace(pair[0], split="train"), replace(pair[1], split="test")], allow=["TENX95"])


def test_a_donor_of_the_list_is_kept_out_by_the_name_that_hest_gives(tmp_path: Path):
    # A section of a later HEST version: not on the list, but of a listed patient.
    (tmp_path / "st").mkdir()
    (tmp_path / "st/NEW1.h5ad").touch()
    (tmp_path / "metadata").mkdir()
    title = "Spatially resolved clonal copy number alterations in benign and malignant tissueJus"
    facts = {
        "id": "NEW1",
        "dataset_title": title,
        "patient": "Patient 2",
        "species": "Homo sapiens",
        "organ": "Prostate",
    }
    (tmp_path / "metadata/NEW1.json").write_text(json.dumps(facts))
    (row,) = hest.catalogue(tmp_path, SectionFacts())
    with pytest.raises(SourceError, match=r"its donor Spatially .*: Patient 2 is that of benchmark section MEND1"):
        guard_benchmark([meta("NEW1", donor=row.donor, split="train")])
    guard_benchmark([meta("NEW1", donor=row.donor.replace("Patient 2", "Patient 9"), split="train")])


def test_allowing_what_is_not_barred_is_an_error():
    with pytest.raises(SourceError, match=r"`allow_benchmark` TENX59: no section of that id.*did you mean TENX95"):
        guard_benchmark([meta("TENX95")], allow=["TENX59"])


@pytest.mark.parametrize("text", ["mine\n", "id\ttask\tdonor\nmine\tOURS\td1\n", "\ufefftask\tid\nOURS\tmine\n"])
def test_a_list_of_ones_own_is_added(tmp_path: Path, text: str):
    path = tmp_path / "ids.tsv"
    path.write_text(text, encoding="utf-8")
    known = load_benchmark(path)
    assert {"mine", "tenx95"} <= set(known)
    assert known["mine"].task in ("OURS", "ids")
    with pytest.raises(SourceError, match="mine is a section of benchmark task"):
        enforce_split_policy([meta("mine", split="train")], benchmark_ids=path)


@pytest.mark.parametrize(
    ("text", "says"), [("", "no benchmark id"), ("task\tname\nA\tb\n", "the table has no column id")]
)
def test_a_bad_list_is_reported(tmp_path: Path, text: str, says: str):
    (tmp_path / "ids.tsv").write_text(text)
    with pytest.raises(SourceError, match=rf"ids\.tsv.*{says}"):
        load_benchmark(tmp_path / "ids.tsv")
    with pytest.raises(SourceError, match=r"none\.tsv"):
        load_benchmark(tmp_path / "none.tsv")


def test_unknown_donors_are_their_own():
    donors = [m.donor for m in own_donors([meta("a", "Unknown "), meta("b", ""), meta("c", "P1")])]
    assert donors == ["unstated:a", "unstated:b", "P1"]


def test_a_donor_on_both_sides_is_refused():
    check_splits([meta("a", "P1", "train"), meta("b", "P1", "val"), meta("c", "P2", "test")])
    with pytest.raises(SourceError, match="donor P1 is in the test section b and in a"):
        check_splits([meta("a", "P1", "train"), meta("b", "P1", "test")])
    with pytest.raises(SourceError, match="donor p1 is in the test section b and in a, c"):
        check_splits([meta("a", "P1", "train"), meta("b", "p1", "test"), meta("c", "P 1", "val")])
    check_splits([meta("a", "", "train"), meta("b", "unknown", "test")])


# -- automatic splits --------------------------------------------------------------------------------------------


def donors(n: int) -> list[SectionMeta]:
    return [meta(f"s{i}", f"P{i // 2}") for i in range(2 * n)]


def test_a_proposed_split_goes_by_donor_and_repeats():
    out = propose_split(donors(300), [0.8, 0.1, 0.1], seed=0)
    assert out == propose_split(donors(300), [0.8, 0.1, 0.1], seed=0)
    assert out != propose_split(donors(300), [0.8, 0.1, 0.1], seed=1)
    check_splits(out)
    assert all(a.split == b.split for a, b in zip(out[::2], out[1::2], strict=True))
    share = Counter(m.split for m in out[::2])
    assert share["train"] / 300 == pytest.approx(0.8, abs=0.07)
    assert share["val"] / 300 == pytest.approx(0.1, abs=0.05)
    # Additional donors move no one.
    assert propose_split(donors(400), [0.8, 0.1, 0.1], seed=0)[:600] == out


def test_stated_splits_stay_and_draw_their_donor_along():
    metas = [*donors(40), meta("x", "P3", "test"), meta("y", "P4", "val")]
    out = {m.section_id: m.split for m in propose_split(metas, [1.0, 0.0, 0.0], seed=0)}
    assert (out["s6"], out["s7"], out["s8"], out["s9"]) == ("test", "test", "val", "val")
    assert Counter(out.values()) == {"train": 76, "test": 3, "val": 3}


def test_spellings_of_a_donor_have_one_split():
    metas = donors(40)
    others = [meta(f"other{i}", f"p {i}") for i in range(40)] + [meta("x", "p3", "test")]
    out = propose_split([*metas, *others], [0.5, 0.25, 0.25], seed=0)
    check_splits(out)
    assert [m.split for m in out[:80:2]] == [m.split for m in out[80:120]]
    assert {m.split for m in out if m.donor in ("P3", "p3", "p 3")} == {"test"}
    # Further spellings move no one.
    kept = [m for m in out[:80] if m.donor != "P3"]
    assert kept == [m for m in propose_split(metas, [0.5, 0.25, 0.25], seed=0) if m.donor != "P3"]


def test_an_empty_split_is_refused_with_a_seed_that_works():
    with pytest.raises(SourceError, match=r"leaves .* empty; use `seed=(\d+)`, which fills all") as error:
        propose_split(donors(3), [0.8, 0.1, 0.1], seed=0)
    seed = int(str(error.value).split("`seed=")[1].split("`")[0])
    assert {m.split for m in propose_split(donors(3), [0.8, 0.1, 0.1], seed=seed)} == {"train", "val", "test"}
    with pytest.raises(SourceError, match="too few donors"):
        propose_split(donors(2), [0.8, 0.1, 0.1], seed=0)
    with pytest.raises(SourceError, match="sum to 1"):
        propose_split(donors(2), [0.8, 0.1], seed=0)


# -- duplicate sections ----------------------------------------------------------------------------------


def expression(n: int = 300, genes: int = 50, seed: int = 0) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.random.default_rng(seed).poisson(2.0, (n, genes)).astype(np.int32))


KEYS = [f"human:G{i}" for i in range(50)]


def picture(seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((400, 380), Image.Resampling.BICUBIC))


def test_hashes_do_not_depend_on_the_order_of_genes_or_spots():
    counts = expression()
    order, rows = np.random.default_rng(1).permutation(50), np.random.default_rng(2).permutation(300)
    shuffled = counts[rows][:, order]
    again = spot_hashes(shuffled, [KEYS[i] for i in order])
    np.testing.assert_array_equal(spot_hashes(counts, KEYS), again)
    assert len(again) == 300
    changed = counts.tolil()
    changed[0, 0] += 1
    assert len(np.setdiff1d(spot_hashes(changed.tocsr(), KEYS), again)) == 1
    other = ["mouse" + k[5:] for k in KEYS]
    assert len(np.intersect1d(spot_hashes(counts, other), again)) == 0
    assert len(spot_hashes(sparse.csr_matrix((5, 50), dtype=np.int32), KEYS)) == 0


def test_the_same_counts_under_two_ids_are_refused_across_splits():
    one = section_fingerprint(expression(), KEYS, picture(0))
    part = section_fingerprint(expression()[100:], KEYS, picture(1))  # cropped, and another image
    other = section_fingerprint(expression(seed=5), KEYS, picture(2))
    assert len(one["spots"]) > SKETCH
    a, b, c = meta("a", "P1", "train"), meta("b", "P2", "test"), meta("c", "P3", "test")
    assert check_duplicates([(a, one), (c, other)]) == {}
    with pytest.raises(
        SourceError, match=r"a \(split train\) and b \(split test\) are duplicates of one section.*identical counts"
    ):
        check_duplicates([(a, one), (b, part), (c, other)])
    notes = check_duplicates([(a, one), (replace(b, split="train"), part)])
    assert "possibly a duplicate of section a" in notes["b"]


def test_the_same_picture_under_two_ids_is_refused_across_splits(tmp_path: Path):
    image = Image.fromarray(picture())
    image.resize((270, 256)).save(tmp_path / "again.jpg", quality=60)
    again = np.asarray(Image.open(tmp_path / "again.jpg"))
    one, two = section_fingerprint(expression(), KEYS, picture()), section_fingerprint(expression(seed=9), KEYS, again)
    with pytest.raises(SourceError, match=r"their images differ in [0-9]+ of 256 bits"):
        check_duplicates([(meta("a", "P1", "train"), one), (meta("b", "P2", "test"), two)])
    blank = [section_fingerprint(expression(seed=s), KEYS, np.full((50, 50, 3), 240, np.uint8)) for s in (1, 2)]
    assert check_duplicates([(meta("a", "P1", "train"), blank[0]), (meta("b", "P2", "test"), blank[1])]) == {}


def test_bits_of_other_pictures_differ():
    apart = [int(np.unpackbits(picture_bits(picture(0)) ^ picture_bits(picture(s))).sum()) for s in range(1, 20)]
    assert min(apart) > 60


def test_a_build_refuses_what_leaks(tmp_path: Path):
    sections = [TinySection("TENX95", "p2", ""), TinySection("b", "p2", "train"), TinySection("c", "p3", "")]
    write_tiny_source(tmp_path / "s", sections, side=4)
    sources = open_source(tmp_path / "s")
    with pytest.raises(SourceError, match="that of TENX95, which is on the list of benchmark sections"):
        build_shards(sources, tmp_path / "out", **SIZE)
    assert not (tmp_path / "out").exists()
    report = build_shards(sources, tmp_path / "out", splits={"b": "test", "c": "train"}, **SIZE)
    assert "TENX95 is a section of benchmark task IDC" in report.text
    splits = {s.section_id: s.split for s in ShardSet(tmp_path / "out").manifest.sections}
    assert splits == {"TENX95": "test", "b": "test", "c": "train"}
    allowed = build_shards(
        sources, tmp_path / "more", splits={"TENX95": "train"}, allow_benchmark=["TENX95", "b"], **SIZE
    )
    assert "allowed by name" in allowed.text


def test_a_build_refuses_a_section_that_is_a_duplicate(tmp_path: Path):
    write_tiny_source(tmp_path / "s", [TinySection("a", "p1", "train"), TinySection("b", "p2", "test")], side=6)
    for name in ("{}.tsv.gz", "{}_spots.tsv"):
        (tmp_path / "s" / name.format("b")).write_bytes((tmp_path / "s" / name.format("a")).read_bytes())
    with pytest.raises(SourceError, match=r"a \(split train\) and b \(split test\) are duplicates of one section"):
        build_shards(open_source(tmp_path / "s"), tmp_path / "out", **SIZE)
    assert not (tmp_path / "out/manifest.json").exists()
    table = pd.read_csv(tmp_path / "s/manifest.tsv", sep="\t")
    table["split"] = "train"
    table.to_csv(tmp_path / "s/manifest.tsv", sep="\t", index=False)
    report = build_shards(open_source(tmp_path / "s"), tmp_path / "out", **SIZE)
    assert "possibly a duplicate of section a" in report.text
