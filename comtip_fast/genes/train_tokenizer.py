"""Train ``tokenizer_v1.json`` on the gene-name table: ``python -m comtip_fast.genes.train_tokenizer``."""

from __future__ import annotations

import json
from pathlib import Path

from comtip_shards.genes.identifiers import GeneResource
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from comtip_fast.genes.text import gene_text
from comtip_fast.genes.tokenizer import FILE, SPECIALS

VOCABULARY = 4096


def main() -> None:
    """Train the tokenizer on all genes except pseudogenes, whose names repeat those of their parent genes, and save it."""
    texts = []
    for row in GeneResource.load().rows:
        if row.kind != "pseudo":
            texts += [gene_text(row.symbol, ""), " " + gene_text("", row.name)]
    tokenizer = Tokenizer(models.BPE())
    # Every digit is a token, so that KRT14 and KRT17 share "KRT", and the vocabulary is not used up by numbers.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    _reserve(tokenizer)
    path = Path(__file__).with_name(FILE)
    tokenizer.save(str(path), pretty=False)
    print(f"{tokenizer.get_vocab_size()} tokens, {path.stat().st_size / 1e3:.0f} kB")


def _reserve(tokenizer: Tokenizer) -> None:
    """Shift all ids and assign the first ids to the special tokens, to which no text is encoded."""
    data = json.loads(tokenizer.to_str())
    vocabulary = {name: i for i, name in enumerate(SPECIALS)}
    for token, i in sorted(data["model"]["vocab"].items(), key=lambda item: item[1]):
        vocabulary[token] = i + len(SPECIALS)
    data["model"]["vocab"] = vocabulary
    tokenizer.model = Tokenizer.from_str(json.dumps(data)).model


if __name__ == "__main__":
    main()
