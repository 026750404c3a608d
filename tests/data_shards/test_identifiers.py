import numpy as np
import pytest
from comtip_shards.genes.identifiers import GeneResource, map_genes
from scipy import sparse

ROWS = [
    {
        "species": "human",
        "symbol": "AAA1",
        "ensembl": "ENSG00000000001",
        "name": "alpha",
        "previous": "OLD1|BOTH",
        "aliases": "X1",
    },
    {
        "species": "human",
        "symbol": "BBB1",
        "ensembl": "ENSG00000000002",
        "name": "beta",
        "previous": "BOTH",
        "aliases": "X1|X2",
    },
    {"species": "human", "symbol": "OLD1", "ensembl": "", "name": "now its own gene", "previous": "", "aliases": ""},
    {
        "species": "mouse",
        "symbol": "Aaa1",
        "ensembl": "ENSMUSG00000000001",
        "name": "alpha",
        "previous": "",
        "aliases": "",
    },
]


@pytest.mark.parametrize(
    ("text", "species", "key", "how"),
    [
        ("ENSG00000000001", "human", "human:AAA1", "ensembl"),
        ("ENSG00000000001.17", "human", "human:AAA1", "ensembl"),
        ("ENSG99999999999.1", "human", "human:ENSG99999999999.1", "unmapped"),
        ("AAA1", "human", "human:AAA1", "symbol"),
        ("aaa1", "human", "human:AAA1", "symbol"),
        ("AAA1", "mouse", "mouse:Aaa1", "symbol"),
        ("OLD1", "human", "human:OLD1", "symbol"),
        ("BOTH", "human", "human:BOTH", "unmapped"),
        ("X1", "human", "human:X1", "unmapped"),
        ("X2", "human", "human:BBB1", "alias"),
        (" AAA1 ", "human", "human:AAA1", "symbol"),
    ],
)
def test_resolve_never_guesses(text: str, species: str, key: str, how: str):
    hit = GeneResource(ROWS).resolve(text, species)
    assert (hit.key, hit.how) == (key, how)


def test_unknown_species_is_refused():
    with pytest.raises(ValueError, match="human and mouse"):
        GeneResource(ROWS).resolve("AAA1", "rat")


def test_collisions_are_summed_and_reported():
    genes = map_genes(["AAA1", "ENSG00000000001.2", "nothing", "X2", "1-Mar"], "human", GeneResource(ROWS))
    assert genes.keys == ["human:AAA1", "human:BBB1"]
    assert genes.unmapped == ["nothing", "1-Mar"]
    assert genes.collisions == {"human:AAA1": ["AAA1", "ENSG00000000001.2"]}
    counts = sparse.csr_matrix(np.array([[1, 2, 9, 4, 5], [0, 3, 9, 0, 0]], np.int32))
    np.testing.assert_array_equal(genes.sum_columns(counts).toarray(), [[3, 4], [3, 0]])
    report = genes.report()
    assert "2 not mapped" in report
    assert "nothing" in report
    assert "spreadsheet" in report


def test_symbols_of_the_source_help_where_ids_do_not():
    genes = map_genes(["ENSG00000999999", "AAA1"], "human", GeneResource(ROWS), symbols=["BBB1", "BBB1"])
    assert [h.key for h in genes.hits] == ["human:BBB1", "human:AAA1"]


def test_the_shipped_table_knows_real_genes():
    resource = GeneResource.load()
    hit = resource.resolve("ENSG00000141736.14", "human")
    assert (hit.symbol, hit.name) == ("ERBB2", "erb-b2 receptor tyrosine kinase 2")
    assert resource.resolve("MLL", "human").key == "human:KMT2A"
    assert resource.resolve("ENSMUSG00000045573.9", "mouse").symbol == "Penk"
    assert len({(r["species"], r["symbol"]) for r in resource.rows}) == len(resource.rows)
