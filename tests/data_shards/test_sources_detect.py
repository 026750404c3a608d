"""Recognising a format and choosing sections."""

from pathlib import Path

import pytest
from comtip_shards import SourceError
from comtip_shards.sources import READERS, detect, open_source
from comtip_shards.sources.selection.choose import check_where, choose, matches

from testkit.tiny import TinySection, write_tiny_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    sections = [TinySection("t1", "a", "train"), TinySection("t2", "b", "train"), TinySection("t3", "b", "train")]
    write_tiny_source(tmp_path / "s", sections, side=3)
    return tmp_path / "s"


def test_a_table_outranks_other_files_of_its_folder(source: Path):
    # The folder is also one of count tables with images.
    assert next(r for r in READERS if r.name == "legacy_st").recognise(source)
    reader, why = detect(source)
    assert reader.name == "manifest"
    assert why == "manifest.tsv has the column sample_id"


def test_an_ambiguous_folder_is_refused_with_both_reasons(source: Path):
    (source / "manifest.tsv").unlink()
    (source / "spatial").mkdir()
    (source / "spatial/scalefactors_json.json").write_text("{}")
    with pytest.raises(SourceError, match=r"space_ranger: spatial/ holds .*legacy_st: count tables.*set `fmt` to"):
        detect(source)
    facts = {"species": "human", "tissue": "breast"}
    assert len(open_source(source, fmt="legacy_st", overrides=facts)) == 3


def test_an_unknown_folder_lists_every_format(tmp_path: Path):
    with pytest.raises(SourceError) as error:
        open_source(tmp_path)
    assert all(f"{r.name}: {r.looks_for}" in str(error.value) for r in READERS)
    with pytest.raises(SourceError, match="`fmt` 'cram' is unknown"):
        open_source(tmp_path, fmt="cram")


def test_sections_are_chosen_by_what_they_are(source: Path):
    chosen = open_source(source, where={"donor": ["b"], "organ": ["Breast"]})
    assert [s.meta.section_id for s in chosen] == ["t2", "t3"]
    with pytest.raises(SourceError, match="no section has tissue lung; choose from: breast, made up"):
        open_source(source, where={"tissue": ["lung"]})
    with pytest.raises(SourceError, match="`where` key 'colour' is unknown"):
        open_source(source, where={"colour": ["blue"]})
    with pytest.raises(SourceError, match="give a list"):
        check_where({"tissue": "breast"})


def test_values_match_as_words_and_an_exact_one_wins():
    assert matches("breast, HER2+", "HER2+", ["breast, HER2+"])
    assert not matches("breastplate", "breast", ["breastplate"])
    assert matches("Visium HD", "visium", ["Visium HD", "Xenium"])
    assert not matches("Visium HD", "visium", ["Visium HD", "Visium"])
    assert choose(["a"], {}, Path(), lambda _: None) == ["a"]
