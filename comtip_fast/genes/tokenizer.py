"""Sub-word tokenizer of gene names: byte-level BPE from a versioned file that is part of the package.

Symbol and full name are encoded separately, so that truncation shortens the name before the symbol.
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
    """Encodes symbols and names as token ids.

    Ids 0 to 2 are ``[PAD]``, ``[GENE]`` and ``[VALUE]``; no text is encoded to them.

    Parameters
    ----------
    text
        Content of a JSON file of the library ``tokenizers``.
    """

    def __init__(self, text: str) -> None:
        self._tokenizer = Tokenizer.from_str(text)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        """SHA-256 of the tokenizer file; saved with every model."""

    @staticmethod
    @cache
    def load() -> GeneTokenizer:
        """Return the tokenizer of the package; it is loaded once per process."""
        return GeneTokenizer(files("comtip_fast.genes").joinpath(FILE).read_text(encoding="utf-8"))

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, symbol: str, name: str, max_tokens: int) -> list[int]:
        """Return the ids of the symbol followed by those of the full name, truncated at the end.

        The list has at least one and at most ``max_tokens`` ids. An empty symbol is encoded as ``?``.

        Raises
        ------
        ValueError
            ``max_tokens`` is below 1.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: must be at least 1")
        symbol_ids = self._ids(gene_text(symbol, "") or "?")
        name_ids = self._ids(" " + gene_text("", name)) if name.strip() else []
        return (symbol_ids + name_ids)[:max_tokens]

    def tokens(self, ids: list[int]) -> list[str]:
        """Return the text of each token id."""
        return [self._tokenizer.decode([i]) for i in ids]

    def _ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        # Special tokens are not parsed from text: a gene named "[PAD]" is encoded as its characters.
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
