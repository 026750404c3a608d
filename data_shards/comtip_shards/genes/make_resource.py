"""Build ``genes_v1.tsv.gz`` from public tables; the output is byte-deterministic.

python make_resource.py --hgnc hgnc_complete_set.txt.gz --mouse Mus_musculus.gene_info.gz --mouse-ensembl mouse_genes.tsv.gz
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
from pathlib import Path

import pandas as pd

COLUMNS = ["species", "symbol", "ensembl", "name", "previous", "aliases", "kind"]
KINDS = {
    "protein-coding gene": "protein",
    "protein-coding": "protein",
    "protein_coding": "protein",
    "pseudogene": "pseudo",
    "pseudo": "pseudo",
}


def human(path: Path) -> pd.DataFrame:
    """Return the approved human genes of HGNC's complete set."""
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    table = table[table["status"] == "Approved"]
    return pd.DataFrame(
        {
            "species": "human",
            "symbol": table["symbol"],
            "ensembl": table["ensembl_gene_id"],
            "name": table["name"],
            "previous": table["prev_symbol"].str.strip('"'),
            "aliases": table["alias_symbol"].str.strip('"'),
            "kind": table["locus_group"].map(lambda k: KINDS.get(k, "rna" if "RNA" in k else "other")),
        }
    )


def mouse(info: Path, ensembl: Path) -> pd.DataFrame:
    """Return mouse genes.

    These are NCBI's protein-coding genes, NCBI's RNA genes and pseudogenes that have an Ensembl id, and genes that only the
    Ensembl table has.
    """
    table = pd.read_csv(info, sep="\t", dtype=str, keep_default_na=False)
    table = table[table["type_of_gene"].isin({"protein-coding", "ncRNA", "rRNA", "scRNA", "snRNA", "snoRNA", "pseudo"})]
    ids = table["dbXrefs"].str.extract(r"Ensembl:(ENSMUSG\d+)", expand=False).fillna("")
    table = table[(ids != "") | (table["type_of_gene"] == "protein-coding")]
    ids = ids.loc[table.index]
    names = table["description"].where(~table["description"].str.fullmatch(r"predicted gene,? ?\d*|-"), "")
    first = pd.DataFrame(
        {
            "species": "mouse",
            "symbol": table["Symbol"],
            "ensembl": ids,
            "name": names,
            "previous": "",
            "aliases": table["Synonyms"].replace("-", ""),
            "kind": table["type_of_gene"].map(lambda k: KINDS.get(k, "rna")),
        }
    )
    first = first.drop_duplicates("symbol")
    extra = pd.read_csv(ensembl, sep="\t", dtype=str, keep_default_na=False)
    extra["ensembl"] = extra["gene_id"].str.replace(r"\.\d+$", "", regex=True)
    extra = extra[~extra["ensembl"].isin(set(first["ensembl"]))].drop_duplicates("ensembl")
    # A known symbol with another id is an older or newer id of the same gene, and becomes an alias.
    known = first.set_index("symbol")["aliases"].to_dict()
    same = extra[extra["gene_name"].isin(known)]
    for symbol, identifier in zip(same["gene_name"], same["ensembl"], strict=True):
        known[symbol] = "|".join(filter(None, [known[symbol], identifier]))
    first["aliases"] = first["symbol"].map(known)
    extra = extra[~extra["gene_name"].isin(known)].drop_duplicates("gene_name")
    second = pd.DataFrame(
        {
            "species": "mouse",
            "symbol": extra["gene_name"],
            "ensembl": extra["ensembl"],
            "name": "",
            "previous": "",
            "aliases": "",
            "kind": extra["gene_type"].map(lambda k: KINDS.get(k, "pseudo" if "pseudogene" in k else "rna")),
        }
    )
    return pd.concat([first, second])


def main() -> None:
    """Write the table to ``resources`` next to this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, meaning in (
        ("--hgnc", "complete set of HGNC, tab-separated"),
        ("--mouse", "gene_info of the mouse from NCBI, tab-separated"),
        ("--mouse-ensembl", "tab-separated table with gene_id (Ensembl), gene_name and gene_type of mouse genes"),
    ):
        parser.add_argument(option, type=Path, required=True, help=meaning)
    args = parser.parse_args()
    table = pd.concat([human(args.hgnc), mouse(args.mouse, args.mouse_ensembl)])
    table = table.apply(lambda c: c.map(lambda v: re.sub(r"\s+", " ", v).strip()))
    table = table.sort_values(["species", "symbol"], kind="stable")[COLUMNS]
    text = io.StringIO()
    table.to_csv(text, sep="\t", index=False, lineterminator="\n", quoting=3)
    out = Path(__file__).parent / "resources" / "genes_v1.tsv.gz"
    with out.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(text.getvalue().encode())
    print(f"{len(table)} genes, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
