"""Options that several commands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from comtip_shards.sections.facts import PoolingOptions, SectionFacts, option_specs, parse_facts
from comtip_shards.storage.atomic import refuse_input_as_output

from comtip_fast.constants import UNS

SECTION_HELP = "SHARDS:section_id (a folder or a URL), a source folder, SOURCE:section_id, or an .h5ad with an image"
TITLES: dict[Any, str] = {
    SectionFacts: "facts about the section, which take precedence over what the source states",
    PoolingOptions: "pooling of bins, cells and transcripts to pseudo-spots",
}


def add_facts(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of :class:`SectionFacts` and :class:`PoolingOptions`."""
    for cls, title in TITLES.items():
        group = parser.add_argument_group(title)
        for spec in option_specs(cls):
            text = spec.description.replace("%", "%%")
            group.add_argument(f"--{spec.name.replace('_', '-')}", choices=spec.choices or None, help=text)


def read_facts(args: argparse.Namespace) -> tuple[SectionFacts, PoolingOptions]:
    """Return the stated facts and options, checked."""
    names = [spec.name for cls in TITLES for spec in option_specs(cls)]
    return parse_facts({name: getattr(args, name) for name in names})


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda (default auto)")


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--out``."""
    parser.add_argument("--out", type=Path, required=True, help=what)


def fresh_h5ad(args: argparse.Namespace) -> Path:
    """Check ``--out`` before the work starts: its name, its folder, and that it is none of the inputs."""
    path: Path = args.out
    if path.suffix != ".h5ad":
        raise ValueError(f"--out {path}: the output is AnnData; give a name that ends in .h5ad")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--out {path}: the folder {path.parent} cannot be written; give another one")
    given = [args.section, args.section.rpartition(":")[0], args.image, args.alignment]
    given += [g[1:] for value in getattr(args, "genes", None) or [] for g in value.split(",") if g.startswith("@")]
    inputs = [Path(p) for p in given if p]
    # In a folder of sources, an earlier answer may be written anew; anything else may be one of the sources.
    answer = path.is_file() and _is_answer(path)
    refuse_input_as_output(path, [p for p in inputs if not (answer and p.is_dir())])
    return path


def _is_answer(path: Path) -> bool:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return UNS in file.get("uns", {})
    except OSError:
        return False


def gene_list(values: list[str]) -> list[str] | None:
    """Return gene names from the command line; ``@file`` reads one per line, ``all`` selects every trained gene."""
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
