import numpy as np
import pytest
from comtip_shards import SourceError
from comtip_shards.genes.identifiers import GeneEntry, GeneResource, map_genes
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
RESOURCE = GeneResource([GeneEntry(**row, kind="protein") for row in ROWS])


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
    hit = RESOURCE.resolve(text, species)
    assert (hit.key, hit.how) == (key, how)


def test_unknown_species_is_refused():
    with pytest.raises(ValueError, match="human or mouse"):
        RESOURCE.resolve("AAA1", "rat")


def test_collisions_are_summed_and_reported():
    genes = map_genes(["AAA1", "ENSG00000000001.2", "nothing", "X2", "1-Mar"], "human", RESOURCE)
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
    genes = map_genes(["ENSG00000999999", "AAA1"], "human", RESOURCE, symbols=["BBB1", "BBB1"])
    assert [h.key for h in genes.hits] == ["human:BBB1", "human:AAA1"]


def test_the_shipped_table_knows_real_genes():
    resource = GeneResource.load()
    hit = resource.resolve("ENSG00000141736.14", "human")
    assert (hit.symbol, hit.name) == ("ERBB2", "erb-b2 receptor tyrosine kinase 2")
    assert resource.resolve("MLL", "human").key == "human:KMT2A"
    assert resource.resolve("ENSMUSG00000045573.9", "mouse").symbol == "Penk"
    assert len({(r.species, r.symbol) for r in resource.rows}) == len(resource.rows)


REPAIRS = {
    # Spreadsheets turn symbols into dates.
    ("2-Sep", "human"): ("SEPTIN2", "date"),
    ("2-Sep", "mouse"): ("Septin2", "date"),
    ("Sep-07", "human"): ("SEPTIN7", "date"),
    ("07-sep", "human"): ("SEPTIN7", "date"),
    ("2-Sept", "human"): ("SEPTIN2", "date"),
    ("X2.Sep", "human"): ("SEPTIN2", "date"),
    ("Sep.02", "human"): ("SEPTIN2", "date"),
    ("2. Sep", "human"): ("SEPTIN2", "date"),
    ("3. Mrz", "human"): ("MARCHF3", "date"),
    ("01. Dez", "human"): ("DELEC1", "date"),
    ("1. Mrz", "human"): ("1. Mrz", "unmapped"),
    ("2024-09-02 00:00:00", "human"): ("SEPTIN2", "date"),
    ("X2024.09.02", "mouse"): ("Septin2", "date"),
    ("2001-03-03", "human"): ("MARCHF3", "date"),
    ("2-Sep-22", "human"): ("SEPTIN2", "date"),
    ("2-Sep-2022", "human"): ("SEPTIN2", "date"),
    ("Sep 2, 2022", "human"): ("SEPTIN2", "date"),
    ("2 September 2022", "human"): ("SEPTIN2", "date"),
    ("2022/09/02", "human"): ("SEPTIN2", "date"),
    ("9/2/2022", "human"): ("SEPTIN2", "date"),
    ("02.09.2022", "human"): ("SEPTIN2", "date"),
    ("02/09/22 00:00", "mouse"): ("Septin2", "date"),
    ("2001-03-01", "human"): ("2001-03-01", "unmapped"),
    ("2001-00-03", "human"): ("2001-00-03", "unmapped"),
    ("2001-13-03", "human"): ("2001-13-03", "unmapped"),
    ("3-Mar", "human"): ("MARCHF3", "date"),
    ("9-Mar", "mouse"): ("Marchf9", "date"),
    ("1-Dec", "human"): ("DELEC1", "date"),
    ("1-Mar", "human"): ("1-Mar", "unmapped"),
    ("2-Mar", "mouse"): ("2-Mar", "unmapped"),
    ("31-Jul", "human"): ("31-Jul", "unmapped"),
    # R replaces characters by dots, and adds an X before a digit; Seurat replaces underscores by hyphens.
    ("HLA.A", "human"): ("HLA-A", "dots"),
    ("HLA.DRB1", "human"): ("HLA-DRB1", "dots"),
    ("MT.CO1", "human"): ("MT-CO1", "dots"),
    ("NKX2.1", "human"): ("NKX2-1", "dots"),
    ("H2.K1", "mouse"): ("H2-K1", "dots"),
    ("mt.Co1", "mouse"): ("mt-Co1", "dots"),
    ("X0610005C13Rik", "mouse"): ("0610005C13Rik", "dots"),
    ("FOO.1", "human"): ("FOO.1", "unmapped"),
    # What is a symbol stays it.
    ("HLA-A", "human"): ("HLA-A", "symbol"),
    ("XIST", "human"): ("XIST", "symbol"),
    ("X", "human"): ("X", "unmapped"),
}


@pytest.mark.parametrize("text", REPAIRS, ids=" ".join)
def test_names_changed_by_spreadsheets_and_r(text: tuple[str, str]):
    hit = GeneResource.load().resolve(*text)
    assert (hit.symbol, hit.how) == REPAIRS[text]


@pytest.mark.parametrize(
    "text",
    [
        "ENSG00000141736_ERBB2",
        "ERBB2_ENSG00000141736",
        "ERBB2|ENSG00000141736.14",
        "ENSG00000141736.14|ERBB2",
        "gene:ENSG00000141736",
    ],
)
def test_an_ensembl_id_that_is_joined_to_a_symbol(text: str):
    hit = GeneResource.load().resolve(text, "human")
    assert (hit.symbol, hit.how) == ("ERBB2", "ensembl")
    assert GeneResource.load().resolve(text, "mouse").how == "unmapped"


@pytest.mark.parametrize(
    ("text", "symbol"),
    [
        ("ENSG00000141736,ENSG00000019582", ""),
        ("ENSG00000141736_ENSMUSG00000062312", "ERBB2"),
        ("ENSG00000141736;ENSG00000141736.1", "ERBB2"),
    ],
)
def test_several_ensembl_ids_in_one_name(text: str, symbol: str):
    """Only if all that are known are one gene."""
    hit = GeneResource.load().resolve(text, "human")
    assert (hit.symbol, hit.how) == ((symbol, "ensembl") if symbol else (text, "unmapped"))


def test_tails_of_make_unique_are_summed_where_the_name_is_a_column():
    genes = map_genes(["2-Sep", "HLA.A", "MT.CO1", "NKX2.1", "TBCE", "TBCE-1", "TBCE.2", "CD74-1"], "human")
    assert genes.keys == [f"human:{s}" for s in ("SEPTIN2", "HLA-A", "MT-CO1", "NKX2-1", "TBCE")]
    assert genes.unmapped == ["CD74-1"]  # CD74 is no column, so this may be another gene
    counts = sparse.csr_matrix(np.arange(1, 9, dtype=np.int32)[None])
    np.testing.assert_array_equal(genes.sum_columns(counts).toarray(), [[1, 2, 3, 4, 5 + 6 + 7]])
    assert "6 names changed by a spreadsheet or by R were repaired: 2-Sep -> SEPTIN2, HLA.A -> HLA-A" in genes.report()


def test_a_sum_of_columns_that_cannot_be_stored_is_refused_by_key():
    genes = map_genes(["CD74", "TBCE", "TBCE-1"], "human")
    counts = sparse.csr_matrix(np.array([[1, 1, 1], [1, 2_000_000_000, 2_000_000_000]], np.int32))
    with pytest.raises(
        SourceError, match=r"^section a: the columns of human:TBCE sum to 4,000,000,000 in one spot.*raw"
    ):
        genes.sum_columns(counts, "section a")


def test_ambiguous_dates_are_named_with_their_candidates():
    genes = map_genes(["1-Mar", "AAA1"], "human")
    assert genes.ambiguous == {"1-Mar": ["MARCHF1", "MTARC1"]}
    assert "were not repaired, rename them: 1-Mar (MARCHF1 or MTARC1)" in genes.report()
    for text in ("1-Mar-22", "2022-03-01", "3/1/2022", "01.03.22", "44621"):  # 44621 is 1 March 2022
        report = map_genes([text, *SYMBOLS], "human").report()
        assert f"were not repaired, rename them: {text} (MARCHF1 or MTARC1)" in report, report


SYMBOLS = ["ERBB2", "CD74", "ACTB", "GAPDH", "MYC", "TP53", "EGFR", "KRT14", "KRT5", "VIM", "CDH1", "ESR1", "PGR"] + [
    f"KRT{i}" for i in (1, 2, 3, 4, 6, 7, 8)
]


@pytest.mark.parametrize(
    ("text", "symbol"),
    [("44818", "SEPTIN14"), ("44818.0", "SEPTIN14"), ("X44818", "SEPTIN14"), ("43800", "DELEC1"), ("44624", "MARCHF4")],
)
def test_a_serial_number_of_a_spreadsheet_is_repaired_where_one_symbol_fits(text: str, symbol: str):
    genes = map_genes([text, *SYMBOLS], "human")
    assert (genes.hits[0].symbol, genes.hits[0].how) == (symbol, "date")
    assert f"{text} -> {symbol}" in genes.report()


def test_numbers_that_may_be_no_dates_are_named_and_not_repaired():
    # Of 4 March 2004 and, on a Mac, 5 March 2008, neither is chosen.
    assert "38050 (MARCHF4 or MARCHF5)" in map_genes(["38050", *SYMBOLS], "human").report()
    # Numbers of rows: the index of a table whose names are lost.
    rows = map_genes([str(i) for i in range(36000, 45000)], "human")
    assert not rows.keys
    assert "were not repaired" in rows.report()
    assert map_genes(["12345", "99999", "44700", "2", "0"], "human").ambiguous == {}


def test_every_symbol_survives_r():
    """Symbols whose dotted form is unique come back from it; the others stay unmapped, never another gene."""
    resource = GeneResource.load()
    wrong = []
    for row in resource.rows:
        if "-" in row.symbol:
            hit = resource.resolve(row.symbol.replace("-", "."), row.species)
            if hit.how == "dots" and hit.symbol != row.symbol:
                wrong.append((row.symbol, hit.symbol))
    assert not wrong


@pytest.mark.parametrize("species", ["human", "mouse"])
def test_entrez_ids_are_not_taken_for_serial_numbers(species: str):
    """Few Entrez ids are numbers of dates, but all are numbers."""
    genes = map_genes([str(i) for i in range(20_000, 60_000, 17)], species)
    assert "date" not in genes.counts_by_how
