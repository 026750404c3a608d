"""``comtip genes GENE ...``: how an identifier is understood, and the sentence the model reads for it."""

from __future__ import annotations

import argparse

from comtip_shards.genes.identifiers import GeneResource

from comtip_fast.genes import GeneTokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "gene", nargs="+", help="symbol, previous symbol, alias or Ensembl id (with or without version)"
    )
    parser.add_argument("--species", choices=("human", "mouse"), help="default: both")


def run(args: argparse.Namespace) -> int:
    """Print one block per gene; exit 1 if any is not known."""
    resource, tokenizer = GeneResource.load(), GeneTokenizer.load()
    unknown = 0
    for gene in args.gene:
        hits = [resource.resolve(gene, s) for s in ([args.species] if args.species else ["human", "mouse"])]
        found = [h for h in hits if h.how != "unmapped"]
        if not found:
            unknown += 1
            print(f"{gene}: not known; a model still reads it as a bare symbol")
        for hit in found:
            tokens = tokenizer.encode(hit.symbol, hit.name, 64)
            print(
                f"{gene}: {hit.key}  {hit.ensembl or '-'}  {hit.name or '(no name)'}  [found by {hit.how}; {len(tokens)} tokens]"
            )
    return 1 if unknown else 0
