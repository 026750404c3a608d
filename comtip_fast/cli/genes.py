"""``comtip genes GENE ...`` shows how identifiers are resolved; ``comtip genes vectors`` computes gene vectors."""

from __future__ import annotations

import argparse
from pathlib import Path

from comtip_shards.genes.identifiers import GeneResource

from comtip_fast.cli.options import add_out, at_least, new_file
from comtip_fast.genes import GeneTokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``comtip genes GENE ...``."""
    parser.add_argument(
        "gene", nargs="+", help="symbols, previous symbols, aliases or Ensembl ids (with or without version)"
    )
    parser.add_argument("--species", choices=("human", "mouse"), help="species to search (default: both)")
    parser.epilog = "comtip genes vectors COUNTS ... --out FILE computes gene vectors; see comtip genes vectors --help."


def add_vectors(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand ``comtip genes vectors``."""
    text = "compute gene vectors from counts without images, or join files of gene vectors of two species"
    parser = sub.add_parser("vectors", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument(
        "counts",
        nargs="+",
        metavar="COUNTS",
        help="count matrices of cells or spots: .h5ad, 10x .h5, folder with 10x matrix.mtx, or .tsv or .csv (also .gz); or the "
        ".safetensors files to join, whose genes have to differ",
    )
    parser.add_argument(
        "--species", choices=("human", "mouse"), help="species of symbols in COUNTS; not needed with Ensembl ids"
    )
    add_out(parser, "the .safetensors file to write")
    parser.add_argument(
        "--components",
        type=at_least(1),
        default=DEFAULTS["components"],
        help="number of principal components (default 30)",
    )
    parser.add_argument(
        "--weigh",
        choices=("cells", "sources"),
        default=DEFAULTS["weigh"],
        help="give equal weight to every cell or to every source (default cells)",
    )
    parser.add_argument(
        "--min-detection",
        type=float,
        default=DEFAULTS["min_detection"],
        help="omit genes detected in a smaller share of cells (default 0)",
    )
    parser.add_argument("--orthologues", action="store_true", help="join human and mouse genes of the same symbol")
    parser.add_argument("--tissue", default="", help="tissue of the counts, recorded in the file")
    parser.add_argument("--licence", default="", help="licence of the counts, recorded in the file and in predictions")
    parser.set_defaults(run=_vectors)


DEFAULTS: dict[str, object] = {
    "species": None,
    "components": 30,
    "weigh": "cells",
    "min_detection": 0.0,
    "orthologues": False,
    "tissue": "",
    "licence": "",
}
"""Options of ``comtip genes vectors`` that apply to counts, with their defaults; files of vectors record their own."""
SUBCOMMANDS = {"vectors": add_vectors}
"""Subcommands; any other first word is a gene."""


def run(args: argparse.Namespace) -> int:
    """Print one line per match and per unknown gene; return 1 if a gene is unknown."""
    if "vectors" in args.gene:
        raise ValueError("comtip genes: vectors is a subcommand; write it first: comtip genes vectors COUNTS ...")
    resource, tokenizer = GeneResource.load(), GeneTokenizer.load()
    unknown = 0
    for gene in args.gene:
        species = [args.species] if args.species else ["human", "mouse"]
        hits = [resource.resolve(gene, s) for s in species]
        found = [h for h in hits if h.how != "unmapped"]
        if not found:
            unknown += 1
            changed = list(dict.fromkeys(name for s in species for name in resource.candidates(gene, s)))
            hint = f"; a spreadsheet or R may have changed {' or '.join(changed)} to it" if changed else ""
            print(
                f"{gene}: not in the table of {args.species or 'human or mouse'} genes; models use the symbol alone{hint}"
            )
        for hit in found:
            tokens = tokenizer.encode(hit.symbol, hit.name, 64)
            names = f"{hit.key}  {hit.ensembl or '-'}  {hit.name or '(no name)'}"
            print(f"{gene}: {names}  [found by {hit.how}; {len(tokens)} tokens]")
    return 1 if unknown else 0


def _vectors(args: argparse.Namespace) -> int:
    """Compute gene vectors, or join files of them, and write the result to ``--out``."""
    from comtip_fast.data.coexpression.vectors import gene_vectors
    from comtip_fast.genes.vectors import GeneVectors, join_vectors

    new_file(args.out, ".safetensors", "one safetensors file with gene vectors")
    if all(Path(given).suffix == ".safetensors" for given in args.counts):
        _refuse_settings_of_counts(args)
        vectors = join_vectors([GeneVectors.load(given) for given in args.counts])
        vectors.save(args.out)
        print(f"{args.out}: {vectors.describe()}")
        return 0
    vectors = gene_vectors(
        args.counts,
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


def _refuse_settings_of_counts(args: argparse.Namespace) -> None:
    """Raise ValueError if an option that applies to counts is given with files of gene vectors."""
    given = [name for name, default in DEFAULTS.items() if getattr(args, name) != default]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{flags}: for counts only, and files of gene vectors are joined as they are; leave it out")
