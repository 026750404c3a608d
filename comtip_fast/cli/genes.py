"""``comtip genes GENE ...``: show how identifiers are resolved and how many tokens their sentences have."""

from __future__ import annotations

import argparse

from comtip_shards.genes.identifiers import GeneResource

from comtip_fast.genes import GeneTokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "gene", nargs="+", help="symbols, previous symbols, aliases or Ensembl ids (with or without version)"
    )
    parser.add_argument("--species", choices=("human", "mouse"), help="species to search (default: both)")


def run(args: argparse.Namespace) -> int:
    """Print one line per match; return 1 if a gene is unknown."""
    resource, tokenizer = GeneResource.load(), GeneTokenizer.load()
    unknown = 0
    for gene in args.gene:
        hits = [resource.resolve(gene, s) for s in ([args.species] if args.species else ["human", "mouse"])]
        found = [h for h in hits if h.how != "unmapped"]
        if not found:
            unknown += 1
            print(f"{gene}: unknown; models use the bare symbol")
        for hit in found:
            tokens = tokenizer.encode(hit.symbol, hit.name, 64)
            names = f"{hit.key}  {hit.ensembl or '-'}  {hit.name or '(no name)'}"
            print(f"{gene}: {names}  [found by {hit.how}; {len(tokens)} tokens]")
    return 1 if unknown else 0
