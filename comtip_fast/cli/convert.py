"""``comtip convert SECTION --out x.zarr``: write a section as a SpatialData store or as a folder of Space Ranger files."""

from __future__ import annotations

import argparse
from pathlib import Path

from comtip_shards.sections.facts import CountOptions, option_specs, parse_facts

from comtip_fast.cli.options import add_out, check_parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``comtip convert``."""
    parser.add_argument(
        "section",
        metavar="SECTION",
        help="an .h5ad written by predict or embed, another .h5ad with obsm['spatial'], or SHARDS:section_id",
    )
    parser.add_argument(
        "--positions",
        metavar="KEY",
        help=next(spec.description for spec in option_specs(CountOptions) if spec.name == "positions"),
    )
    add_out(parser, "NAME.zarr for SpatialData, or a new folder for the files of Space Ranger (h5 matrix and spatial/)")


def run(args: argparse.Namespace) -> int:
    """Read the section and write it to ``--out``, as SpatialData or as Space Ranger files."""
    out: Path = args.out
    if out.suffix in (".h5ad", ".h5"):
        raise ValueError(
            f"--out {out}: give NAME.zarr for SpatialData, or the name of a new folder for Space Ranger files"
        )
    check_parent(out)
    if out.exists():
        raise FileExistsError(f"--out {out}: exists; remove it, or give another name")
    from comtip_shards.errors import SourceError

    from comtip_fast.data.convert import provenance, read_section, write_space_ranger, write_spatialdata

    data = read_section(args.section, parse_facts({"positions": args.positions})[2].positions)
    try:
        (write_spatialdata if out.suffix == ".zarr" else write_space_ranger)(data, out)
    except SourceError as error:
        raise SourceError(f"{args.section}: {error}") from error
    print(f"{out}: {provenance(data)}, {data.n_obs} spots x {data.n_vars} genes")
    return 0
