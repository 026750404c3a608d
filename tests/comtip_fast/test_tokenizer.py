"""The gene tokenizer: offline, never empty, never raises, and the name is truncated before the symbol."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files

import pytest
from comtip_shards.genes.identifiers import GeneResource
from hypothesis import given, settings
from hypothesis import strategies as st

from comtip_fast.genes import GENE_ID, PAD_ID, VALUE_ID, GeneTokenizer, gene_text
from comtip_fast.genes.tokenizer import FILE, SPECIALS

# A new file is a new version: exports contain this hash, and ids of different files are not comparable.
V1 = "f7b1c59d2ea19e8144fa6e51c10d397e6bb8c444d6d243c2a6210dc77a53a9ff"
ANY_TEXT = st.text(alphabet=st.characters(), max_size=40)


@pytest.fixture(scope="module")
def tokenizer() -> GeneTokenizer:
    return GeneTokenizer.load()


def test_the_file_has_the_published_hash(tokenizer: GeneTokenizer) -> None:
    raw = files("comtip_fast.genes").joinpath(FILE).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == tokenizer.sha256 == V1
    assert len(raw) < 400_000


def test_ids_are_consecutive(tokenizer: GeneTokenizer) -> None:
    data = json.loads(files("comtip_fast.genes").joinpath(FILE).read_text(encoding="utf-8"))
    ids = sorted(data["model"]["vocab"].values())
    assert ids == list(range(tokenizer.vocab_size))
    assert 4000 <= tokenizer.vocab_size <= 4200
    assert [data["model"]["vocab"][s] for s in SPECIALS] == [PAD_ID, GENE_ID, VALUE_ID] == [0, 1, 2]


def test_orthologues_have_the_same_text() -> None:
    assert gene_text("Krt14", "Keratin 14") == gene_text("KRT14", "keratin 14") == "KRT14 keratin 14"
    assert gene_text("TP53", "") == "TP53"


def test_load_is_cached_per_process() -> None:
    assert GeneTokenizer.load() is GeneTokenizer.load()


@settings(max_examples=150, deadline=None)
@given(symbol=ANY_TEXT, name=ANY_TEXT, max_tokens=st.integers(1, 30))
def test_any_text_encodes(symbol: str, name: str, max_tokens: int) -> None:
    tokenizer = GeneTokenizer.load()
    ids = tokenizer.encode(symbol, name, max_tokens)
    assert 1 <= len(ids) <= max_tokens
    assert all(2 < i < tokenizer.vocab_size for i in ids)
    symbol_ids = tokenizer.encode(symbol, "", 10_000)
    assert ids[: len(symbol_ids)] == symbol_ids[:max_tokens]
    assert tokenizer.encode(symbol, name, 10_000)[:max_tokens] == ids


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\ud800", "é🧬", "日本", "\x00", "[PAD]", "[VALUE]", "A" * 500])
def test_awkward_symbols(tokenizer: GeneTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, "", 16)
    assert 1 <= len(ids) <= 16
    assert not set(ids) & {PAD_ID, GENE_ID, VALUE_ID}


def test_the_name_is_truncated_before_the_symbol(tokenizer: GeneTokenizer) -> None:
    symbol = tokenizer.encode("KRT14", "", 99)
    full = tokenizer.encode("KRT14", "keratin 14", 99)
    assert "".join(tokenizer.tokens(full)) == gene_text("KRT14", "keratin 14")
    assert tokenizer.encode("KRT14", "keratin 14", len(symbol)) == symbol
    assert tokenizer.encode("KRT14", "keratin 14", len(symbol) + 1) == full[: len(symbol) + 1]


def test_max_tokens_below_one_is_an_error(tokenizer: GeneTokenizer) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        tokenizer.encode("KRT14", "", 0)


def test_family_members_share_their_root(tokenizer: GeneTokenizer) -> None:
    a, b = tokenizer.encode("KRT14", "", 9), tokenizer.encode("KRT17", "", 9)
    assert a[:-1] == b[:-1]
    assert a != b


def test_real_symbols_are_short_distinct_and_decodable(tokenizer: GeneTokenizer) -> None:
    rows = [r for r in GeneResource.load().rows if r.kind == "protein"][::7]
    texts = {gene_text(r.symbol, "") for r in rows}
    encoded = {t: tokenizer.encode(t, "", 99) for t in texts}
    assert len({tuple(ids) for ids in encoded.values()}) == len(texts) > 4000
    assert all("".join(tokenizer.tokens(ids)) == text for text, ids in encoded.items())
    assert sum(len(ids) <= 8 for ids in encoded.values()) > 0.9 * len(texts)
