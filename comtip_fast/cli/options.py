"""Options shared by several commands, and their names in messages of the library."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from comtip_shards.not_data import text_encoding
from comtip_shards.sections.facts import CountOptions, PoolingOptions, SectionFacts, option_specs, parse_facts
from comtip_shards.storage.atomic import refuse_input_as_output

from comtip_fast.constants import UNS

SLIDES_HELP = "or an image or whole-slide file without spots, or (with a folder as --out) a folder of these"
SECTION_HELP = "SHARDS:section_id (SHARDS is a folder or URL), a source folder, SOURCE:section_id, an .h5ad with image, or FILE.h5ad:section_id"
GENE_FILE_BYTES = 4 << 20
NAME_BYTES, PATH_BYTES = 255, 4096
"""Maximum length of a name, and of a path with its final null byte, on Linux."""
GENE_COLUMNS = {"gene", "genes", "symbol", "symbols", "gene_symbol", "hgnc_symbol", "gene_name", "gene_id", "ensembl"}
GENE_COLUMNS |= {"ensembl_id", "x"}
"""Headers of a column of genes; R writes ``x`` for a vector."""
_MARKED = re.compile(r"`([a-z]\w*(?:\.\w+)*)(?:=([^`\s]*))?`")
"""A Python argument or setting in a message: ```mpp```, ```tile_px=224``` or ```data.tile_px=224```."""
OptionNames = Mapping[str, str]
"""Options by the name of the Python argument that they set."""
TITLES: dict[Any, str] = {
    SectionFacts: "facts about the section, which override those of the source",
    CountOptions: "counts and positions in an AnnData",
    PoolingOptions: "pooling of bins, cells and transcripts to pseudo-spots",
}


def add_facts(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of the option classes in :mod:`comtip_shards.sections.facts`."""
    for cls, title in TITLES.items():
        group = parser.add_argument_group(title)
        for spec in option_specs(cls):
            text = spec.description.replace("%", "%%")
            group.add_argument(f"--{spec.name.replace('_', '-')}", choices=spec.choices or None, help=text)


def read_facts(args: argparse.Namespace) -> tuple[SectionFacts, PoolingOptions, CountOptions]:
    """Return the facts and options of :func:`add_facts` from the command line, with their types and bounds checked."""
    names = [spec.name for cls in TITLES for spec in option_specs(cls)]
    return parse_facts({name: getattr(args, name) for name in names})


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add ``--format``."""
    from comtip_shards.sources import FORMATS

    parser.add_argument(
        "--format",
        dest="fmt",
        choices=("auto", *FORMATS),
        default="auto",
        help="format of a source folder (default: detect it)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda (default auto)")


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--out``."""
    parser.add_argument("--out", type=Path, required=True, help=what)


def check_out(args: argparse.Namespace) -> None:
    """Check, before a command starts its work, that the path of ``--out`` exists or can be created.

    Raises
    ------
    ValueError, NotADirectoryError, PermissionError
        A name in the path is too long, a file is where a folder must be, or the folder cannot be written to.
    """
    path: Path | None = getattr(args, "out", None)
    if path is None:
        return
    long = next((part for part in path.parts if len(os.fsencode(part)) > NAME_BYTES), None)
    if long is not None or len(os.fsencode(path)) >= PATH_BYTES:
        what = f"the name {(long or path.name)[:40]}... " + (
            f"has {len(os.fsencode(long))} bytes, but file systems allow {NAME_BYTES}"
            if long is not None
            else f"makes a path of {len(os.fsencode(path)):,} bytes, but {PATH_BYTES - 1:,} are allowed"
        )
        raise ValueError(f"--out: {what}; give a shorter name")
    if os.path.lexists(path):
        return
    folder = next((p for p in path.absolute().parents if os.path.lexists(p)), path.absolute().parent)
    if not folder.is_dir():
        raise NotADirectoryError(f"--out {path}: {folder} is not a folder; give a path in a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {path}: no permission to write to {folder}; give another folder")


def at_least(low: int) -> Callable[[str], int]:
    """Return a function that parses an integer of at least ``low``, for ``type=`` of an option."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r}: give an integer of at least {low}")
        return value

    return parse


def names_in(option: str, values: Sequence[str]) -> list[str]:
    """Return the names in an option's values, which may be comma-separated.

    Raises
    ------
    ValueError
        There is no name; the message states the option.
    """
    names = [name.strip() for value in values for name in value.split(",") if name.strip()]
    if not names:
        raise ValueError(
            f"{option} {' '.join(map(repr, values))} names nothing; give at least one name, or leave the option out"
        )
    return list(dict.fromkeys(names))


def new_file(option_value: Path, suffix: str, what: str) -> Path:
    """Check, before slow work, that a file can be written to the path of ``--out``, and return the path.

    Parameters
    ----------
    option_value
        The value of ``--out``.
    suffix, what
        Suffix that the name must have, and what the file is, for the message.

    Raises
    ------
    ValueError, FileNotFoundError, IsADirectoryError, PermissionError
        The name has another suffix, the path is a folder, or its parent folder does not exist or cannot be written to.
    """
    path = option_value
    if path.suffix != suffix:
        raise ValueError(f"--out {path}: the output is {what}; give a name that ends in {suffix}")
    if path.is_dir():
        raise IsADirectoryError(f"--out {path}: is a folder; give the name of a file")
    check_parent(path)
    return path


def check_parent(out: Path) -> None:
    """Check that the parent folder of ``--out`` exists and can be written to, even if the output exists; see :func:`check_out`.

    Raises
    ------
    FileNotFoundError, PermissionError
        The folder does not exist, or cannot be written to.
    """
    folder = out.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"--out {out}: the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"--out {out}: the folder {folder} cannot be written to; give a path in another folder")


def out_folder(args: argparse.Namespace) -> Path:
    """Check, before slow work, that ``--out`` is neither a file nor a folder without write permission, and return the path.

    Raises
    ------
    NotADirectoryError, PermissionError
        ``--out`` is a file, or a folder without permission to write to it.
    """
    path: Path = args.out
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--out {path}: is a file; give a folder")
    if path.exists() and not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {path}: no permission to write to this folder; give another folder")
    return path


def refuse_unused(given: Mapping[str, object], why: str) -> None:
    """Raise ValueError if an option that would be ignored is given.

    Parameters
    ----------
    given
        Values by option, e.g. ``--epochs``; None, False and an empty list mean that it is not given.
    why
        Why the option has no effect, or when it has one, for the message.
    """
    unused = [name for name, value in given.items() if value is not None and value is not False and value != []]
    if unused:
        verb, them = ("has", "it") if len(unused) == 1 else ("have", "them")
        raise ValueError(f"{', '.join(unused)} {verb} no effect here: {why}; leave {them} out")


def fresh_h5ad(args: argparse.Namespace) -> Path:
    """Check the name and the folder of ``--out``, and that the file is not an input, and return the path.

    Raises
    ------
    ValueError, FileNotFoundError, IsADirectoryError, PermissionError
        As for :func:`new_file`; ValueError also if the file is an input.
    """
    path = new_file(args.out, ".h5ad", "an AnnData file")
    given = [args.section, args.section.rpartition(":")[0], args.image, args.alignment]
    given += [g[1:] for value in getattr(args, "genes", None) or [] for g in value.split(",") if g.startswith("@")]
    inputs = [Path(p) for p in given if p]
    # In a folder of sources only an earlier output may be replaced; other files may be sources.
    answer = path.is_file() and is_answer(path)
    refuse_input_as_output(path, [p for p in inputs if not (answer and p.is_dir())])
    return path


def is_answer(path: Path) -> bool:
    """Return whether the file is an AnnData that ``comtip predict`` or ``comtip embed`` wrote."""
    from comtip_shards.errors import SourceError
    from comtip_shards.sources.hdf5.opening import open_hdf5

    try:
        with open_hdf5(path, "an .h5ad", "delete it") as file:
            return UNS in file.get("uns", {})
    except (SourceError, OSError):
        return False


def gene_list(values: list[str]) -> list[str] | None:
    """Return gene names from the command line, or None for all genes of the model.

    Parameters
    ----------
    values
        Symbols or Ensembl ids, optionally comma-separated; ``@file`` reads a file (:func:`read_gene_file`); a single
        ``all`` selects all genes of the model.

    Raises
    ------
    ValueError, FileNotFoundError
        No gene is named, ``all`` is combined with others, or a file is not a list of genes.
    """
    parts = [part.strip() for value in values for part in value.split(",") if part.strip()]
    genes: list[str] = []
    for part in parts:
        genes += read_gene_file(Path(part[1:])) if part.startswith("@") else [part]
    if genes == ["all"]:
        return None
    if "all" in genes:
        raise ValueError(
            "--genes: all stands for all genes of the model and cannot be combined with other names; give all alone, or remove it"
        )
    if not genes:
        raise ValueError("--genes names no gene; give symbols or Ensembl ids, @file, or all")
    return genes


def _column(rows: list[tuple[int, list[str]]], index: int, width: int) -> list[tuple[int, list[str]]]:
    """Return column ``index`` of a table of ``width`` headers, or all cells of its rows if there is only one header.

    R writes row names without a header: if every row has one cell more than there are headers, the column is shifted by one.
    """
    named = all(len(cells) == width + 1 and cells[-1] for _, cells in rows)
    if named and (width > 1 or all(cells[0].isdigit() for _, cells in rows)):
        index += 1
    elif width == 1:
        return rows
    return [(number, cells[index : index + 1]) for number, cells in rows]


def read_gene_file(path: Path) -> list[str]:
    """Read a list of genes, one per line or comma-separated, in UTF-8 or UTF-16; comments (``#``) are skipped.

    If the first line has a header of :data:`GENE_COLUMNS`, the genes are the values below this header.

    Raises
    ------
    ValueError, FileNotFoundError
        The file is missing, a folder, too large, or of another encoding, names no gene, or has a value that is not a gene name.
    """
    where = f"--genes @{path}"
    if not path.exists():
        raise FileNotFoundError(f"{where}: no such file; give an existing file, or gene names without @")
    if path.is_dir():
        raise ValueError(f"{where}: a folder; give a file with one gene per line")
    with path.open("rb") as file:
        raw = file.read(GENE_FILE_BYTES + 1)
    if len(raw) > GENE_FILE_BYTES:
        raise ValueError(
            f"{where}: larger than {GENE_FILE_BYTES >> 20} MiB, not a list of genes; give a file with one gene per line"
        )
    try:
        # Excel and R on Windows write a byte order mark; Excel's "Unicode text" is UTF-16.
        text = raw.decode(text_encoding(raw))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None
    rows = [
        (number, [c.strip().strip('"') for c in re.split(r"[,;\t]", line.partition("#")[0])])
        for number, line in enumerate(text.splitlines(), start=1)
        if line.partition("#")[0].strip()
    ]
    first = rows[0][1] if rows else []
    headers = GENE_COLUMNS if len(first) == 1 else GENE_COLUMNS - {"x"}
    header = next((i for i, cell in enumerate(first) if cell.lower() in headers), None)
    if header is not None:
        rows = _column(rows[1:], header, len(first))
    genes: list[str] = []
    for number, cells in rows:
        for gene in filter(None, cells):
            if not gene.isprintable() or " " in gene or re.fullmatch(r"[-+\d.eE]+", gene):
                raise ValueError(
                    f"{where}, line {number}: {gene[:40]!r} is not a gene name; give one gene per line, or a table with a "
                    "column named gene"
                )
            genes.append(gene)
    if not genes:
        raise ValueError(f"{where}: names no gene; give one gene per line (for all genes of the model: --genes all)")
    return genes


def options_of(parser: argparse.ArgumentParser) -> OptionNames:
    """Return ``{name of the Python argument: option}`` of a command and its subcommands.

    The ``dest`` of every option is the name of the Python argument that it sets.
    """
    found: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                found.update(options_of(sub))
        elif action.option_strings:
            found[action.dest] = action.option_strings[-1]
    return found


def name_options(text: str, own: OptionNames, other: Callable[[], OptionNames]) -> str:
    """Return a message with options instead of the Python arguments that the library marks.

    ```mpp```, ```tile_px=224``` and ```data.tile_px=224``` become ``--mpp``, ``--tile-px 224`` and
    ``--set data.tile_px=224``.

    Parameters
    ----------
    text
        A message of the library.
    own
        Options of the command that runs, from :func:`options_of`.
    other
        Returns the options of the command that builds shards, which messages of other commands name too.

    Returns
    -------
    str
        The message. A name that is not an option is not changed.
    """

    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        if "." in name:
            return match[0] if value is None else f"--set {name}={value}"
        found = own.get(name) or other().get(name)
        if found is None:
            return match[0]
        return found if value is None else f"{found} {value}"

    return _MARKED.sub(option, text)
