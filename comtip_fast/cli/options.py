"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

SECTION_HELP = "SHARDS:section_id (a folder or a URL), a source folder, SOURCE:section_id, or an .h5ad with an image"
META = ("mpp", "species", "tissue", "donor", "platform", "licence", "attribution", "pixels", "image")
POOLING = {
    "pool_um": "width of a pseudo-spot in um (default: 128 for Visium HD, 100 for Xenium)",
    "pool_from": "what is pooled: bins or cells (Visium HD), transcripts or cells (Xenium)",
    "bin_um": "bins to pool, Visium HD (default: the largest that pool-um is a multiple of)",
    "min_cover": "share of a pseudo-spot's bins that must lie in tissue, Visium HD (default 0.5)",
    "min_pooled": "what a pseudo-spot must hold (default: 1 cell, or 5 %% of the transcripts that a dense one holds)",
    "qv": "least quality of a transcript, Xenium (default 20)",
    "alignment": "Xenium: csv of a 3 x 3 matrix (H&E px to DAPI px), or keypoints from Xenium Explorer",
}


def add_meta(parser: argparse.ArgumentParser) -> None:
    """Add options for what a source does not state itself."""
    group = parser.add_argument_group("facts that the source does not state")
    group.add_argument("--mpp", help="um per px of the image that the positions belong to")
    group.add_argument("--species", choices=("human", "mouse"))
    for name in META[2:-2]:
        group.add_argument(f"--{name}", help=argparse.SUPPRESS if name == "attribution" else None)
    group.add_argument(
        "--image", help="the image to cut tiles from (for Space Ranger the original, or the word hires or lowres); "
        "{id} in it stands for the section"
    )  # fmt: skip
    group.add_argument(
        "--pixels", choices=("wsi", "patches"), help="HEST: what tiles are cut from (default: WSI if there)"
    )
    pooling = parser.add_argument_group("pooling of bins, cells and transcripts to pseudo-spots")
    for name, text in POOLING.items():
        pooling.add_argument(f"--{name.replace('_', '-')}", help=text)


def meta(args: argparse.Namespace) -> dict[str, str]:
    """Return those that were given."""
    return {k: str(v) for k in (*META, *POOLING) if (v := getattr(args, k, None)) is not None}


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--out``."""
    parser.add_argument("--out", type=Path, required=True, help=what)


def fresh_h5ad(path: Path) -> Path:
    """Check an output path before the work starts."""
    if path.suffix != ".h5ad":
        raise ValueError(f"--out {path}: the answer is AnnData; give a name that ends in .h5ad")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: the folder {path.parent} does not exist")
    return path


def gene_list(values: list[str]) -> list[str] | None:
    """Return symbols from the command line; ``@file`` reads one per line, ``all`` means every trained gene."""
    genes: list[str] = []
    for value in values:
        for part in value.split(","):
            if part.startswith("@"):
                genes += [
                    line.strip() for line in Path(part[1:]).read_text(encoding="utf-8").splitlines() if line.strip()
                ]
            elif part.strip():
                genes.append(part.strip())
    return None if genes in ([], ["all"]) else genes
