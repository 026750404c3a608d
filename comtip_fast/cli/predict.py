"""``comtip predict RUN SECTION --out x.h5ad``: predict gene expression; ``comtip embed``: embed tiles in the shared space.

For ``predict``, SECTION may be a slide without spots, or a folder of slides.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from comtip_shards.sections.facts import SectionFacts, stated
from comtip_shards.sources.anndata_parts.store import files_of
from comtip_shards.sources.files.packaging import contents
from comtip_shards.storage.disk import disk_trouble, unwritable

from comtip_fast.cli.options import (
    SECTION_HELP,
    SLIDES_HELP,
    add_device,
    add_facts,
    add_format,
    add_out,
    check_parent,
    fresh_h5ad,
    gene_list,
    is_answer,
    names_in,
    read_facts,
    refuse_unused,
)
from comtip_fast.constants import OBSM_EMBEDDING

if TYPE_CHECKING:
    from comtip_fast.api import Model

log = logging.getLogger("comtip_fast")
MAX_NAME_BYTES = 240
"""Maximum length of the name of a slide's output, to which ``.NAME.parts`` and ``NAME.overlays`` add up to 10 bytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``comtip predict``."""
    parser.add_argument("run_dir", metavar="RUN", help="folder of a finished run, or an export")
    parser.add_argument("section", metavar="SECTION", help=f"{SECTION_HELP}; {SLIDES_HELP}")
    parser.add_argument(
        "--genes",
        nargs="+",
        default=["all"],
        help="symbols, Ensembl ids or @FILE; all predicts all trained genes (default all)",
    )
    parser.add_argument("--gene-vectors", help="file of `comtip genes vectors`, to predict genes that were not trained")
    add_out(parser, "the .h5ad to write; if SECTION is a folder of slides, the folder for one .h5ad per slide")
    slide = parser.add_argument_group("slides without spots")
    slide.add_argument("--grid", choices=("square", "hexagonal"), help="lattice of the tiles (default square)")
    slide.add_argument("--step-um", type=float, help="distance between tile centres in um (default: width of a tile)")
    slide.add_argument(
        "--min-tissue",
        type=float,
        help="smallest share of tissue in a tile; 0 predicts the complete image (default 0.2)",
    )
    slide.add_argument("--overlays", nargs="+", metavar="GENE", help="draw these genes to OUT.overlays/GENE.png")
    slide.add_argument(
        "--geojson",
        nargs="*",
        metavar="GENE",
        help="write OUT.geojson for QuPath with these genes (default: all, if at most 50)",
    )
    add_facts(parser)
    add_format(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Predict a section, a slide or a folder of slides, and write the result; return 1 if a slide of a folder failed."""
    path = Path(args.section)
    if path.is_dir() and args.out.suffix != ".h5ad":
        return _predict_folder(args, path)
    if _is_slide(path):
        return _predict_slides(args, {path: fresh_h5ad(args)})
    _refuse_slide_options(args)
    return _predict_section(args)


def _predict_section(args: argparse.Namespace) -> int:
    """Predict a section and write the result to ``--out``."""
    from comtip_fast.api import load
    from comtip_fast.data.h5ad import write_h5ad

    out = fresh_h5ad(args)
    facts, pooling, counts = read_facts(args)
    model = load(args.run_dir, args.device, args.gene_vectors)
    genes = gene_list(args.genes)
    answer = model.predict(args.section, genes, facts=facts, pooling=pooling, counts=counts, fmt=args.fmt)
    write_h5ad(answer, out)
    seen = answer.var["training"].value_counts().to_dict()
    origins = ", ".join(f"{n} {k}" for k, n in seen.items())
    by_vector = sum(model.predictor.has_vector(key) for key in answer.var["key"][answer.var["training"] != "trained"])
    vectors = f"; {by_vector} of the genes that were not trained have a gene vector" if args.gene_vectors else ""
    print(f"{out}: {answer.n_obs} spots x {answer.n_vars} genes ({origins}{vectors})")
    return 0


def _is_slide(path: Path) -> bool:
    """Return whether the path is an image or whole-slide file, by its suffix or its first bytes."""
    from comtip_shards.slides.open import IMAGE_SUFFIXES, VENDOR_SUFFIXES, is_image

    return path.is_file() and (path.suffix.lower() in IMAGE_SUFFIXES | VENDOR_SUFFIXES or is_image(path))


def _source_format(folder: Path) -> str:
    """Return the format of a folder of sections; empty for other folders."""
    from comtip_shards import SourceError
    from comtip_shards.sources import detect

    if (folder / "manifest.json").is_file():
        return "shard set"
    try:
        return detect(folder)[0].name
    except SourceError:
        return ""


def _refuse_slide_options(args: argparse.Namespace) -> None:
    """Raise ValueError if an option for slides without spots is given for a section; FileNotFoundError if there is no such path."""
    names = ("grid", "step_um", "min_tissue", "overlays", "geojson")
    given = {f"--{name.replace('_', '-')}": True for name in names if getattr(args, name) is not None}
    path = Path(args.section)
    if given and not path.exists() and ":" not in args.section:
        raise FileNotFoundError(f"{path} does not exist; check the path")
    what = (
        f"with an --out that ends in .h5ad, the folder {path} is read as sections"
        if path.is_dir()
        else f"{args.section} is not an image or whole-slide file"
    )
    refuse_unused(given, f"used for slides without spots only, and {what}")


def _predict_folder(args: argparse.Namespace, folder: Path) -> int:
    """Predict every slide of a folder, and write one file per slide to ``--out``."""
    kind = _source_format(folder)
    if kind == "anndata" and all(is_answer(p) for p in files_of(folder)):
        kind = ""  # predictions of an earlier run with the slides' folder as --out
    if kind == "shard set":
        raise ValueError(
            f"{folder}: a shard set, not a folder of slides; name a section ({folder}:SECTION_ID), and give an --out that ends in "
            ".h5ad"
        )
    if kind:
        raise ValueError(
            f"{folder}: sections of format {kind}, not a folder of slides; give an --out that ends in .h5ad, or move the "
            "slides to a folder of their own"
        )
    slides = [p for p in contents(folder) if _is_slide(p)]
    if not slides:
        raise FileNotFoundError(
            f"{folder}: no image or whole-slide file; for a section, give an --out that ends in .h5ad"
        )
    if args.out.exists() and not args.out.is_dir():
        raise NotADirectoryError(f"--out {args.out}: is a file, but {folder} is a folder of slides; give a folder")
    if not args.out.exists():
        check_parent(args.out)
    args.out.mkdir(exist_ok=True)
    return _predict_slides(args, {p: args.out / f"{name}.h5ad" for p, name in _output_names(slides).items()})


def _output_names(slides: Sequence[Path]) -> dict[Path, str]:
    """Return a distinct output name per slide: its file name, with the suffix only where names would otherwise be equal."""
    stems = Counter(p.stem for p in slides)
    names = {p: p.name if stems[p.stem] > 1 else p.stem for p in slides}
    # The name of a.tif, next to a.png, equals the stem of a.tif.png.
    return names if len(set(names.values())) == len(slides) else {p: p.name for p in slides}


def _predict_slides(args: argparse.Namespace, outputs: dict[Path, Path]) -> int:
    """Predict slides one by one, and return the exit code.

    If one of several slides fails, the others are still predicted, and the failure is reported at the end. A disk error ends the
    command.
    """
    from comtip_fast.api import load

    facts, pooling, counts = read_facts(args)
    refused = [*stated(pooling, counts), *(["format"] if args.fmt != "auto" else [])]
    why = "used for sections with counts only, and a slide without spots has none"
    refuse_unused({f"--{name.replace('_', '-')}": True for name in refused}, why)
    model, genes = load(args.run_dir, args.device, args.gene_vectors), gene_list(args.genes)
    _check_drawings(args, model, genes, facts)
    failed = []
    for path, out in outputs.items():
        try:
            _predict_slide(args, model, genes, facts, path, out)
        except (ValueError, OSError) as error:
            if len(outputs) == 1 or disk_trouble(error) is not None or unwritable(error) is not None:
                raise
            failed.append(path.name)
            log.error("%s", error if path.name in str(error) else f"{path}: {error}")
    if failed:
        log.error("%d of %d slides failed: %s", len(failed), len(outputs), ", ".join(failed))
    return 1 if failed else 0


def _drawn(args: argparse.Namespace) -> tuple[list[str] | None, list[str] | None]:
    """Return the genes of ``--overlays`` and of ``--geojson``; None if the option is not given.

    None is also the value of ``--geojson`` without a gene, which means all predicted genes.
    """
    overlays = None if args.overlays is None else names_in("--overlays", args.overlays)
    return overlays, names_in("--geojson", args.geojson) if args.geojson else None


def _check_drawings(args: argparse.Namespace, model: Model, genes: list[str] | None, facts: SectionFacts) -> None:
    """Check before the prediction, which takes long, that the genes to draw will be predicted; raise ValueError if not."""
    from comtip_fast.slide_prediction.drawings import check_genes, check_measurements

    overlays, measured = _drawn(args)
    predicted = genes
    if predicted is None:
        own = {g.key: g.symbol for g in model.predictor.bundle.genes}
        predicted = [own[key] for key in model.trained_genes if key.startswith(facts.species or "")]
    if overlays is not None:
        check_genes(predicted, overlays, "--overlays")
    if args.geojson is not None:
        check_measurements(predicted, measured, "--geojson")


def _predict_slide(
    args: argparse.Namespace, model: Model, genes: list[str] | None, facts: SectionFacts, path: Path, out: Path
) -> None:
    """Predict one slide, write the result to ``out``, and draw the requested overlays and GeoJSON next to it."""
    from comtip_fast.slide_prediction import GridOptions
    from comtip_fast.slide_prediction.drawings import Answer, write_geojson, write_overlays

    if len(os.fsencode(out.name)) > MAX_NAME_BYTES:
        raise ValueError(
            f"{out}: a name of {len(os.fsencode(out.name))} bytes, but at most {MAX_NAME_BYTES} are allowed for a slide, because the names "
            "of its overlays and unfinished pieces are longer; give a shorter name"
        )
    given = {"shape": args.grid, "step_um": args.step_um, "min_tissue": args.min_tissue}
    grid = GridOptions(**{k: v for k, v in given.items() if v is not None})
    answer = model.predict_slide(path, genes, out=out, facts=facts, grid=grid, progress=True)
    print(f"{out}: {answer.n_obs} tiles x {answer.n_vars} genes")
    answer.file.close()
    overlays, measured = _drawn(args)
    if overlays is not None:
        folder = out.with_name(f"{out.stem}.overlays")
        written = write_overlays(Answer(out), overlays, folder)
        print(f"{folder}: {', '.join(p.name for p in written)}")
    if args.geojson is not None:
        target = out.with_name(f"{out.stem}.geojson")
        written_tiles = write_geojson(Answer(out), measured, target)
        print(f"{target}: {written_tiles} tiles")


# -- comtip embed ----------------------------------------------------------------------------------------------


def add_embed_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``comtip embed``."""
    parser.add_argument("run_dir", metavar="RUN", help="folder of a finished run, or an export")
    parser.add_argument("section", metavar="SECTION", help=SECTION_HELP)
    add_out(parser, f"the .h5ad to write, with vectors in obsm[{OBSM_EMBEDDING!r}]")
    add_facts(parser)
    add_format(parser)
    add_device(parser)


def run_embed(args: argparse.Namespace) -> int:
    """Embed the section and write the result."""
    from comtip_fast.api import load
    from comtip_fast.data.h5ad import write_h5ad

    out = fresh_h5ad(args)
    facts, pooling, counts = read_facts(args)
    model = load(args.run_dir, args.device)
    answer = model.embed(args.section, facts=facts, pooling=pooling, counts=counts, fmt=args.fmt)
    write_h5ad(answer, out)
    rows, dim = answer.obsm[OBSM_EMBEDDING].shape
    print(f"{out}: obsm[{OBSM_EMBEDDING!r}] {rows} x {dim}")
    return 0
