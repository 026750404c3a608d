"""The sub-word tokenizer of gene names: byte-level BPE in one versioned file, offline, for any text.

Symbol and full name are encoded apart, so that a cut never takes from the symbol what the name would use.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files

from tokenizers import Tokenizer

from comtip_fast.genes.text import gene_text

PAD_ID, GENE_ID, VALUE_ID = 0, 1, 2
SPECIALS = ("[PAD]", "[GENE]", "[VALUE]")
FILE = "tokenizer_v1.json"


class GeneTokenizer:
    """Symbols and names to token ids. Ids 0 to 2 are ``[PAD]``, ``[GENE]``, ``[VALUE]`` and never stand in a name."""

    def __init__(self, text: str) -> None:
        self._tokenizer = Tokenizer.from_str(text)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        """Of the tokenizer's file; saved with every model."""

    @staticmethod
    @cache
    def load() -> GeneTokenizer:
        """Read the file that ships with the package, once per process."""
        return GeneTokenizer(files("comtip_fast.genes").joinpath(FILE).read_text(encoding="utf-8"))

    @property
    def vocab_size(self) -> int:
        """Rows of the token table."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, symbol: str, name: str, max_tokens: int) -> list[int]:
        """Return at most ``max_tokens`` ids, at least one.

        The symbol comes whole, then as much of the name as fits. Only a symbol that is alone longer than
        ``max_tokens`` is cut, and then nothing of the name is left. Without a symbol or name the text is ``?``.

        Raises
        ------
        ValueError
            ``max_tokens`` is below 1.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1 (given: {max_tokens})")
        first = self._ids(gene_text(symbol, "") or "?")
        rest = self._ids(" " + gene_text("", name)) if name.strip() else []
        return (first + rest)[:max_tokens]

    def tokens(self, ids: list[int]) -> list[str]:
        """Return the pieces of text that ids stand for."""
        return [self._tokenizer.decode([i]) for i in ids]

    def _ids(self, text: str) -> list[int]:
        # Special tokens are not looked for in the text: a gene called "[PAD]" is only letters.
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
