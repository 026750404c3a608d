"""``comtip genes GENE ...`` shows how identifiers are resolved; ``comtip genes vectors`` computes gene vectors."""

from __future__ import annotations

import argparse
from pathlib import Path

from comtip_shards.genes.identifiers import GeneResource

from comtip_fast.genes import GeneTokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "gene",
        nargs="+",
        help="symbols, previous symbols, aliases or Ensembl ids (with or without version); or: vectors COUNTS ...",
    )
    parser.add_argument(
        "--species", choices=("human", "mouse"), help="species to search (default: both); species of symbols in COUNTS"
    )
    group = parser.add_argument_group(
        "comtip genes vectors COUNTS ... --out FILE: gene vectors from counts without images"
    )
    group.add_argument("--out", type=Path, help="the .safetensors file to write")
    group.add_argument("--components", type=int, default=30, help="number of principal components (default 30)")
    group.add_argument(
        "--weigh",
        choices=("cells", "sources"),
        default="cells",
        help="give equal weight to every cell or to every source (default cells)",
    )
    group.add_argument(
        "--min-detection", type=float, default=0.0, help="omit genes detected in a smaller share of cells (default 0)"
    )
    group.add_argument("--orthologues", action="store_true", help="join human and mouse genes of the same symbol")
    group.add_argument("--tissue", default="", help="tissue of the counts, recorded in the file")
    group.add_argument("--licence", default="", help="licence of the counts, recorded in the file and in predictions")


def run(args: argparse.Namespace) -> int:
    """Print one line per match and return 1 if a gene is unknown. With ``vectors``, compute gene vectors."""
    return _vectors(args) if args.gene[0] == "vectors" else _resolve(args)


def _resolve(args: argparse.Namespace) -> int:
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


def _vectors(args: argparse.Namespace) -> int:
    from comtip_fast.data.coexpression.vectors import gene_vectors

    if args.out is None or args.out.suffix != ".safetensors":
        raise ValueError(
            f"--out {args.out}: gene vectors are one safetensors file; give a name that ends in .safetensors"
        )
    if len(args.gene) < 2:
        raise ValueError("comtip genes vectors: no counts given; name at least one .h5ad, 10x .h5 or .tsv(.gz)")
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: the folder {args.out.parent} does not exist; create it first")
    vectors = gene_vectors(
        args.gene[1:],
        components=args.components,
        species=args.species,
        tissue=args.tissue,
        licence=args.licence,
        weigh=args.weigh,
        min_detection=args.min_detection,
        orthologues=args.orthologues,
    )
    vectors.save(args.out)
    print(f"{args.out}: {vectors.describe()}")
    return 0
