"""``comtip shards``: check sections (``check SOURCE``), and build, merge and verify sets (``build SOURCE``, ``merge PART ...``, ``verify SET``)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast, get_args

from comtip_shards.builder.build import part_of
from comtip_shards.builder.merge import merge_sets
from comtip_shards.builder.skipping import OnError, check_policy
from comtip_shards.builder.tile_choice import choose_tile
from comtip_shards.format.manifest import REPORTS
from comtip_shards.names import printable
from comtip_shards.qc import check_sources
from comtip_shards.reader.verify import verify
from comtip_shards.sections.section import SectionId, Split
from comtip_shards.slides.tiles import FIELD_UM
from comtip_shards.sources import FORMATS as SOURCE_FORMATS
from comtip_shards.sources import SectionSource, detect
from comtip_shards.storage.remote import is_url
from comtip_shards.study import is_study
from comtip_shards.study.dry_run import plan_splits, plan_text

from comtip_fast.cli.options import add_facts, add_out, at_least, names_in, read_facts, refuse_unused
from comtip_fast.shards import build_shards, open_sections, plan_build

FORMATS = ("auto", *SOURCE_FORMATS)
_POLICY = {"stop": "ends with the first of these sections", "skip": "leaves these sections out"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their options."""
    sub = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_build(
        sub.add_parser("build", help="cut tiles and write shards", description="Build a shard set from sections.")
    )
    check = sub.add_parser(
        "check",
        help="check sections before a build",
        description="Check the quality of every section; write a page per section, with spots drawn on the image, and a table.",
    )
    _add_source(check)
    add_out(check, "a new folder, or the output of an earlier check")
    check.add_argument("--strict", action="store_true", help="exit with code 1 if a check fails")
    check.set_defaults(act=_check)
    merge = sub.add_parser(
        "merge",
        help="merge the parts of a build, or sets with equal settings",
        description="Merge the parts of a build, or shard sets with equal settings, without decoding tiles.",
    )
    merge.add_argument("parts", nargs="+", metavar="PART", help="folders or URLs")
    add_out(merge, "folder of the merged set")
    _add_jobs(merge)
    merge.set_defaults(act=_merge)
    verify = sub.add_parser(
        "verify", help="verify a shard set", description="Verify hashes, counts and every record of a shard set."
    )
    verify.add_argument("set", metavar="SET", help="a folder, or a URL (s3://, gs://, https://, hf://)")
    verify.set_defaults(act=_verify)


def _add_source(parser: argparse.ArgumentParser) -> None:
    """Add the options that select sections."""
    parser.add_argument(
        "source",
        help="a folder or file of any known format, the URL of one (s3://, gs://, https://, hf://datasets/...), or a table of "
        "these: csv, tsv or YAML with the column path, and id, sample, donor, split, mpp or any other option per row",
    )
    parser.add_argument("--cache", type=Path, help="folder for downloaded files (default: the user's cache folder)")
    parser.add_argument("--samples", help="comma-separated ids of sections to use (default: all)")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE[,VALUE]",
        help="use only sections with this species, tissue, platform, donor or dataset; may be repeated; a section must match all",
    )
    parser.add_argument(
        "--format", dest="fmt", choices=FORMATS, default="auto", help="format of the source (default: detect it)"
    )
    parser.add_argument("--tile-um", type=float, help="width of a tile in um (default 112)")
    add_facts(parser)


def _add_build(build: argparse.ArgumentParser) -> None:
    """Add the options of ``comtip shards build``."""
    _add_source(build)
    add_out(build, "folder of the new shard set")
    build.add_argument(
        "--tile-px",
        type=int,
        help="width of a tile in px (default 224, or a smaller multiple of 32 if images are coarser)",
    )
    build.add_argument(
        "--min-mpp",
        type=float,
        help="blur finer images to this resolution in um per px (default: that of the tile or, if a section is coarser, of the "
        "coarsest section)",
    )
    build.add_argument(
        "--codec", choices=("jpeg", "png", "webp"), default="jpeg", help="encoding of tiles (default jpeg)"
    )
    build.add_argument("--quality", type=int, help="quality of jpeg and webp, 1 to 100 (default 95)")
    _add_jobs(build)
    build.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="build part I of N into its own --out, e.g. one per machine; combine the parts with merge",
    )
    build.add_argument("--strict", action="store_true", help="refuse sections that fail a check")
    build.add_argument(
        "--dry-run",
        action="store_true",
        help="read headers only; print for each section what would be built, what is missing, time and size",
    )
    build.add_argument(
        "--on-error",
        choices=get_args(OnError),
        default="stop",
        help="a section that cannot be built ends the build (stop, default), or is left out and reported at the end (skip)",
    )
    group = build.add_argument_group("splits by donor, and benchmark sections excluded from training")
    group.add_argument(
        "--split",
        dest="splits",
        action="append",
        default=[],
        metavar="SECTION=SPLIT",
        help="train, val or test; overrides the source; may be repeated",
    )
    group.add_argument(
        "--auto-split",
        type=_shares,
        metavar="TRAIN,VAL,TEST",
        help="assign donors without a split at random, e.g. 0.8,0.1,0.1",
    )
    group.add_argument("--seed", type=at_least(0), help="seed of --auto-split (default 0)")
    group.add_argument(
        "--allow-benchmark",
        action="append",
        default=[],
        metavar="ID",
        help="allow this section in training although it or its donor is in a benchmark",
    )
    group.add_argument(
        "--benchmark-ids",
        type=Path,
        metavar="FILE",
        help="more ids to exclude from training: one per line, or a table with a column id",
    )
    build.set_defaults(act=_build)


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    """Add ``--jobs``."""
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=1,
        metavar="N",
        help="number of processes (default 1); the output does not depend on it",
    )


def _part(text: str) -> tuple[int, int]:
    """Parse ``I/N``."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N, e.g. 2/4")
    return int(index), int(count)


def run(args: argparse.Namespace) -> int:
    """Run ``build``, ``check``, ``merge`` or ``verify``, and return the exit code."""
    return int(args.act(args))


def _build(args: argparse.Namespace) -> int:
    """Build a shard set and print its report; return 1 if a section was skipped. With ``--dry-run``, see :func:`_dry_run`."""
    if args.auto_split is None:
        refuse_unused({"--seed": args.seed}, "used with --auto-split only")
    if args.codec == "png":
        refuse_unused({"--quality": args.quality}, "PNG is lossless")
    args.seed = 0 if args.seed is None else args.seed
    args.quality = 95 if args.quality is None else args.quality
    if args.dry_run:
        refuse_unused({"--strict": args.strict}, "a dry run reads headers only, so it runs no check")
        return _dry_run(args)
    report = build_shards(
        args.source,
        args.out,
        **_source_options(args),
        tile_px=args.tile_px,
        min_mpp=args.min_mpp,
        codec=args.codec,
        quality=args.quality,
        splits=dict(map(_split, args.splits)),
        strict=args.strict,
        allow_benchmark=args.allow_benchmark,
        benchmark_ids=args.benchmark_ids,
        auto_split=args.auto_split,
        seed=args.seed,
        jobs=args.jobs,
        part=args.part,
        progress=True,
        on_error=args.on_error,
    )
    print(printable(args.with_options(report.text)))
    _print_pages(args.out / REPORTS)
    return int(bool(report.skipped))


def _dry_run(args: argparse.Namespace) -> int:
    """Print what a build would do; return 1 if a section or the set cannot be built."""
    check_policy(args.on_error, args.part)
    plans, refused = plan_splits(
        plan_build(args.source, **_source_options(args)),
        dict(map(_split, args.splits)),
        args.auto_split,
        allow_benchmark=args.allow_benchmark,
        benchmark_ids=args.benchmark_ids,
        seed=args.seed,
    )
    tile = choose_tile(
        [p.source.meta for p in plans if p.source is not None and "mpp" not in p.assumed],
        px=args.tile_px,
        um=args.tile_um,
        min_mpp=args.min_mpp,
        codec=args.codec,
        quality=args.quality,
    )
    if args.part is not None and all(p.source is not None for p in plans):
        part = part_of([p.source.meta for p in plans if p.source is not None], args.part)
        plans = plans if part is None else [plans[i] for i in part.sections]
    text = plan_text(plans, tile, args.out, args.jobs, refused)
    if any(p.problems for p in plans):
        text += f"with `on_error={args.on_error}` a build {_POLICY[args.on_error]}\n"
    print(printable(args.with_options(text)))
    return int(refused is not None or any(p.problems for p in plans))


def _split(item: str) -> tuple[SectionId, Split]:
    """Parse ``SECTION=SPLIT``; raise ValueError for an unknown split."""
    section, _, split = item.partition("=")
    if split not in get_args(Split):
        raise ValueError(f"--split {item}: write SECTION=train, SECTION=val or SECTION=test")
    return section, cast(Split, split)


def _merge(args: argparse.Namespace) -> int:
    """Merge shard sets and print the report."""
    report = merge_sets(args.parts, args.out, jobs=args.jobs, progress=True)
    print(printable(args.with_options(report.text)))
    _print_pages(args.out / REPORTS)
    return 0


def _check(args: argparse.Namespace) -> int:
    """Check sections, write their pages and print the findings; with ``--strict``, return 1 if a check failed."""
    reports = check_sources(
        _open(args), args.out, tile_um=FIELD_UM if args.tile_um is None else args.tile_um, progress=True
    )
    for report in reports:
        text = "\n".join([f"{report.section_id}: {report.status}", *(f"  {line}" for line in report.lines)])
        print(printable(args.with_options(text)))
    _print_pages(args.out)
    return int(args.strict and any(r.status == "fail" for r in reports))


def _print_pages(folder: Path) -> None:
    """Print where the pages of the checks are, if there are any: a set of an earlier version may have none."""
    if (folder / "index.html").is_file():
        print(printable(f"pages of the checks: {folder / 'index.html'}"))


def _open(args: argparse.Namespace) -> list[SectionSource]:
    """Open the sections that the options select."""
    return open_sections(args.source, **_source_options(args), progress=True)


def _source_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that select and open sections."""
    facts, pooling, counts = read_facts(args)
    samples = None if args.samples is None else names_in("--samples", [args.samples])
    return {
        "facts": facts,
        "pooling": pooling,
        "counts": counts,
        "fmt": _format(args),
        "samples": samples,
        "where": _where(args.where),
        "cache": args.cache,
        "tile_um": args.tile_um,
    }


def _format(args: argparse.Namespace) -> str:
    """Return the format; if it was detected, print the reason."""
    if args.fmt != "auto" or is_url(args.source) or not Path(args.source).exists() or is_study(args.source):
        return str(args.fmt)
    reader, why = detect(Path(args.source))
    print(printable(f"read as {reader.name}: {why}"))
    return reader.name


def _shares(text: str) -> list[float]:
    """Parse ``TRAIN,VAL,TEST``."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write TRAIN,VAL,TEST as numbers, e.g. 0.8,0.1,0.1") from None


def _where(items: list[str]) -> dict[str, list[str]]:
    """Parse ``KEY=VALUE[,VALUE]`` into lists of values by key."""
    out: dict[str, list[str]] = {}
    for item in items:
        key, _, values = item.partition("=")
        out.setdefault(key.strip(), []).extend(v.strip() for v in values.split(",") if v.strip())
    return out


def _verify(args: argparse.Namespace) -> int:
    """Verify a shard set and print the report; return 1 if it is damaged."""
    report = verify(args.set, progress=True)
    print(printable(args.with_options(report.text)))
    return 0 if report.ok else 1
