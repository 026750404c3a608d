"""Stated facts and pooling options: typed, bounded, and refused by name."""

from dataclasses import fields
from pathlib import Path

import pytest
from comtip_shards import SourceError
from comtip_shards.sections.facts import (
    META_KEYS,
    POOL_KEYS,
    CountOptions,
    PoolingOptions,
    SectionFacts,
    SourceOptions,
    option_specs,
    parse_facts,
    source_options,
    stated,
)


def test_text_is_accepted_at_the_edge_and_becomes_a_number():
    facts, pooling, counts = parse_facts({"mpp": "0.5", "species": "mouse", "pool_um": 64, "tissue": None})
    assert facts == SectionFacts(mpp=0.5, species="mouse")
    assert pooling == PoolingOptions(pool_um=64.0)
    assert counts == CountOptions()
    assert stated(facts, pooling) == {"mpp": "0.5", "species": "mouse", "pool_um": "64"}
    assert stated(None, SectionFacts()) == {}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("mpp", "0", "greater than 0"),
        ("mpp", "-1", "greater than 0"),
        ("mpp", "nan", "finite"),
        ("mpp", "half", "valid number"),
        ("species", "rat", "'human' or 'mouse'"),
        ("tissue", "", "must not be empty"),
        ("tissue", "  ", "must not be empty"),
        ("min_cover", 1.5, "less than or equal to 1"),
        ("pool_from", "spots", "'bins', 'cells' or 'transcripts'"),
        ("qv", -1, "greater than or equal to 0"),
        ("qv", "inf", "finite"),
        ("min_cover", "0", "greater than 0"),
        ("min_pooled", "0", "greater than or equal to 1"),
        ("min_pooled", 2.5, "valid integer"),
        ("round_counts", "maybe", "'yes' or 'no'"),
    ],
)
def test_values_out_of_bounds_name_the_option_the_value_and_the_bound(name, value, reason):
    with pytest.raises(SourceError, match=f"`{name}` .*{reason}"):
        parse_facts({name: value})


def test_an_unknown_fact_is_refused_with_the_known_ones():
    with pytest.raises(SourceError, match=r"unknown fact 'specie'.*species"):
        parse_facts({"specie": "human"})


def test_the_readers_know_every_fact():
    names = [spec.name for cls in (SectionFacts, PoolingOptions, CountOptions) for spec in option_specs(cls)]
    assert set(names) == set(META_KEYS)
    assert {f.name for f in fields(PoolingOptions)} == set(POOL_KEYS)
    choices = {spec.name: spec.choices for spec in option_specs(SectionFacts)}
    assert choices["species"] == ("human", "mouse")
    assert choices["mpp"] == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (SourceOptions(facts=SectionFacts(mpp=-1.0)), "`mpp` -1.0: must be greater than 0"),
        (SourceOptions(facts=SectionFacts(species="rat")), "`species` rat: must be 'human' or 'mouse'"),
        (SourceOptions(pooling=PoolingOptions(qv=float("nan"))), "`qv` nan: must be a finite number"),
    ],
)
def test_typed_options_are_checked_too(given: SourceOptions, message: str):
    """A dataclass takes any value, so the readers' edge checks it."""
    with pytest.raises(SourceError, match=message):
        source_options(given)


def test_options_become_typed_values():
    options = source_options(
        {"species": "Mus musculus", "image": Path("a.png"), "min_pooled": "3", "round_counts": "no", "tissue": ""}
    )
    assert options.facts == SectionFacts(species="mouse", image="a.png")
    assert options.pooling == PoolingOptions(min_pooled=3)
    assert options.counts == CountOptions(round_counts=False)
    assert options.stated() == {"species": "mouse", "image": "a.png", "min_pooled": "3", "round_counts": "no"}
    assert source_options(options) == options
    assert {spec.name: spec.choices for spec in option_specs(CountOptions)}["round_counts"] == ("yes", "no")
