"""``comtip shards build SOURCE --out DIR`` and ``comtip shards verify DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from comtip_shards.build import build_shards
from comtip_shards.sources import FORMATS as SOURCE_FORMATS
from comtip_shards.sources import detect, open_source
from comtip_shards.verify import verify

from comtip_fast.cli.options import add_meta, add_out, meta

FORMATS = ("auto", *SOURCE_FORMATS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the two sub-commands."""
    sub = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = sub.add_parser("build", help="cut tiles and write shards", description="Build a shard set from sections.")
    build.add_argument(
        "source", type=Path, help="a manifest.tsv table (or its folder), a legacy ST or a Space Ranger folder"
    )
    add_out(build, "folder of the new shard set")
    build.add_argument("--samples", help="sections to take, by id, with commas (default: all)")
    build.add_argument("--where", action="append", default=[], metavar="KEY=VALUE[,VALUE]",
                       help="take only sections of this species, tissue, platform, donor or dataset; "
                       "may be given many times, all must hold")  # fmt: skip
    build.add_argument("--format", choices=FORMATS, default="auto", help="of the source (default: recognise it)")
    build.add_argument("--tile-um", type=float, default=224.0, help="width of a tile in um (default 224)")
    build.add_argument("--tile-px", type=int, default=128, help="width of a tile in px (default 128)")
    build.add_argument(
        "--min-mpp", type=float, default=4.0, help="blur finer images to this many um per px (default 4)"
    )
    build.add_argument("--codec", choices=("jpeg", "png", "webp"), default="jpeg")
    build.add_argument("--split", action="append", default=[], metavar="SECTION=SPLIT",
                       help="train, val or test; overrides the source, may be given many times")  # fmt: skip
    add_meta(build)
    build.set_defaults(act=_build)
    check = sub.add_parser(
        "verify", help="prove a shard set whole", description="Check hashes, counts and every record."
    )
    check.add_argument("folder", type=Path)
    check.set_defaults(act=_verify)


def run(args: argparse.Namespace) -> int:
    """Carry out the sub-command."""
    return int(args.act(args))


def _build(args: argparse.Namespace) -> int:
    samples = [s.strip() for s in args.samples.split(",") if s.strip()] if args.samples else None
    splits = {}
    for item in args.split:
        section, _, split = item.partition("=")
        if split not in {"train", "val", "test"}:
            raise ValueError(f"--split {item}: write SECTION=train, SECTION=val or SECTION=test")
        splits[section] = split
    fmt = args.format
    if fmt == "auto" and args.source.exists():
        reader, why = detect(args.source)
        fmt = reader.name
        print(f"read as {fmt}: {why}")
    sources = open_source(args.source, samples=samples, fmt=fmt, overrides=meta(args), where=_where(args.where))
    report = build_shards(
        sources, args.out, tile_px=args.tile_px, tile_um=args.tile_um, min_mpp=args.min_mpp, codec=args.codec,
        splits=splits, progress=True,
    )  # fmt: skip
    print(report.text)
    return 0


def _where(items: list[str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for item in items:
        key, _, values = item.partition("=")
        out.setdefault(key.strip(), []).extend(v.strip() for v in values.split(",") if v.strip())
    return out


def _verify(args: argparse.Namespace) -> int:
    report = verify(args.folder)
    print(report.text)
    return 0 if report.ok else 1
