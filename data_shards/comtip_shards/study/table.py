"""Reading of the table of a study: csv, tsv or YAML, with one row per source.

A row names a source of any format (``path``), and may state the section (``sample``), its id in the set (``id``), the
split, the format, and any fact or option of :mod:`comtip_shards.sections.facts`. The table is checked completely before
any source is opened.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from comtip_shards.errors import SourceError
from comtip_shards.names import check_section_id
from comtip_shards.not_data import refuse_not_data, text_encoding
from comtip_shards.sections.facts import META_KEYS, SourceOptions, lowered, source_options
from comtip_shards.sections.section import RENAME, Split
from comtip_shards.sources import FORMATS
from comtip_shards.sources.files.opening import fix_of
from comtip_shards.sources.files.tables import with_point

SUFFIXES = (".csv", ".tsv", ".yaml", ".yml")
MAX_BYTES = 16 << 20
"""Maximum size of a table in bytes."""
MAX_ROWS = 100_000
NUMBERS = ("mpp", "pool_um", "bin_um", "min_cover", "qv")
"""Columns of numbers, which may have a decimal comma in tables that are separated by semicolons."""
MAX_CELL = 4096
"""Maximum length of a cell in characters."""
_Cell = Annotated[str, Field(max_length=MAX_CELL)]


class StudyRow(BaseModel):
    """One row of the table; ``None`` means not stated."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    number: Annotated[int, Field(ge=1)]
    """Line of a csv or tsv file, or number of the entry of a YAML file, for messages."""
    path: Annotated[_Cell, Field(min_length=1)]
    """Source: a path relative to the table, an absolute path, or a URL."""
    id: _Cell | None = None
    """Section id in the set; without ``sample``, it also selects the section of this id in a source with several."""
    sample: _Cell | None = None
    """Section id in the source."""
    split: Annotated[Split | None, BeforeValidator(lowered)] = None
    format: Annotated[Literal[("auto", *FORMATS)] | None, BeforeValidator(lowered)] = None  # type: ignore[valid-type]
    options: SourceOptions = Field(default_factory=SourceOptions)
    """Facts and options of the row."""


OWN = tuple(name for name in StudyRow.model_fields if name not in ("number", "options"))
COLUMNS = (*OWN, *META_KEYS)
"""Columns that a table may have."""


def read_study(path: Path) -> list[StudyRow]:
    """Read and check a table.

    Parameters
    ----------
    path
        A ``.csv``, ``.tsv`` (commas, semicolons or tabs) or ``.yaml`` file. YAML is a list of mappings, or a mapping with such a
        list under ``sections``. In column names, case is ignored and ``-`` equals ``_``; empty cells mean not stated.

    Raises
    ------
    SourceError
        The file cannot be read, a column is unknown, or a value is out of range; the message names the row and the column.
    """
    if not path.is_file():
        what = "a folder, not a table" if path.is_dir() else "no such file"
        raise SourceError(f"{path}: {what}; correct the path of the table")
    refuse_not_data(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); {fix_of(error)}") from error
    if len(raw) > MAX_BYTES:
        raise SourceError(f"{path}: larger than {MAX_BYTES >> 20} MiB, not a table of sources; check the path")
    try:
        text = raw.decode(text_encoding(raw))
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text ({error}); save the table as UTF-8") from error
    found = _yaml_rows(path, text) if path.suffix.lower() in (".yaml", ".yml") else _csv_rows(path, text)
    rows = [_row(path, number, cells) for number, cells in found]
    if not rows:
        raise SourceError(f"{path}: the table has no rows; write one per source, with its path")
    return rows


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, cells) of a csv or tsv file; blank lines and comments are skipped."""
    lines = _Lines(text)
    first = next((line for line in io.StringIO(text) if not _is_comment(line) and line.strip()), "")
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    sep = max((usual, *",\t;"), key=first.count)  # no name of a column has one of these
    limit = csv.field_size_limit(MAX_BYTES)  # of the whole process
    reader = csv.reader(lines, delimiter=sep, strict=True)
    try:
        header: list[str] = []
        while not header and not lines.ended:
            header = _without_tail(lines.record(reader))
        names = _columns(path, header)
        for count in itertools.count(1):
            values = lines.record(reader)
            if lines.ended:
                return
            if count > MAX_ROWS:
                raise SourceError(f"{path}: more than {MAX_ROWS:,} rows; split the table")
            values = _without_tail(values) if len(values) > len(names) else values
            if not any(v.strip() for v in values):
                continue
            if len(values) > len(names):
                raise SourceError(
                    f"{path}, line {reader.line_num}: {len(values)} values for {len(names)} columns; quote values that "
                    f"contain {'a tab' if sep == chr(9) else sep!r}"
                )
            cells = dict(zip(names, (v.strip() for v in values), strict=False))
            if sep == ";":  # the comma is the decimal separator of these languages
                cells |= {n: with_point(cells[n]) for n in NUMBERS if n in cells}
            yield reader.line_num, cells
    except csv.Error as error:
        raise SourceError(
            f"{path}, line {reader.line_num}: {error}; correct the quotes in this line or before it"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


class _Lines:
    """Lines of a csv text; a line that begins with ``#`` is returned as a blank one, except inside a quoted value."""

    def __init__(self, text: str) -> None:
        self._lines = io.StringIO(text, newline="")
        self._first_of_record = True
        self.ended = False
        """Whether :meth:`record` has reached the end."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        is_comment = self._first_of_record and _is_comment(line)
        self._first_of_record = False
        return "\n" if is_comment else line

    def record(self, reader: Iterator[list[str]]) -> list[str]:
        """Return the next record of a reader of these lines; an empty list for blank lines, comments and the end."""
        self._first_of_record = True
        values = next(reader, None)
        self.ended = values is None
        return values or []


def _without_tail(values: list[str]) -> list[str]:
    """Return a line without empty cells at its end, which spreadsheets write for columns that were cleared."""
    while values and not values[-1].strip():
        values = values[:-1]
    return values


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses aliases, because they can expand to any size, and reads every scalar as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML reads this name)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node; refuse aliases."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not read; write the values", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; refuse a key that occurs twice, of which YAML would keep the last."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"duplicate key {key.value[:80]!r}; remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep=deep)


def _yaml_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (number, cells) of the entries of a YAML file."""
    try:
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise SourceError(f"{path}: not YAML ({' '.join(str(error).split())}); correct the line") from error
    if isinstance(content, dict) and set(content) == {"sections"}:
        content = content["sections"]
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise SourceError(f"{path}: not a list of sources; write one entry per source: - path: FOLDER")
    if len(content) > MAX_ROWS:
        raise SourceError(f"{path}: more than {MAX_ROWS:,} entries; split the table")
    for number, entry in enumerate(content, 1):
        names = _columns(path, [str(name) for name in entry], f", entry {number}")
        for name, value in zip(names, entry.values(), strict=True):
            if not isinstance(value, str):
                raise SourceError(f"{path}, entry {number}: {name} is not a single value; write one value")
        yield number, dict(zip(names, (value.strip() for value in entry.values()), strict=True))


def _columns(path: Path, header: Sequence[str], where: str = "") -> list[str]:
    """Return the normalised names of the columns; raises SourceError for an unknown or duplicate column, or without a column ``path``."""
    names = [name.strip().lower().replace("-", "_") for name in header]
    for name in names:
        if name not in COLUMNS:
            if name == "sample_id":
                raise SourceError(
                    f"{path}{where}: a column sample_id, as in a table of sections, not of sources; save the table separated by "
                    "tabs as manifest.tsv and give that file"
                )
            near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.5)
            known = f"did you mean {near[0]}? The columns are" if near else "the columns are"
            raise SourceError(f"{path}{where}: unknown column {name[:80]!r}; {known} {', '.join(COLUMNS)}")
        if names.count(name) > 1:
            raise SourceError(f"{path}{where}: duplicate column {name}; remove one")
    if "path" not in names:
        raise SourceError(
            f"{path}{where}: no column path; add it, with the file, folder or URL of the source in each row"
        )
    return names


def _row(path: Path, number: int, cells: dict[str, str]) -> StudyRow:
    """Return a row after validating its cells; raises SourceError that names the row and the column."""
    where = f"{path}, {'entry' if path.suffix.lower() in ('.yaml', '.yml') else 'line'} {number}"
    stated = {name: value for name, value in cells.items() if value}
    facts = {name: value for name, value in stated.items() if name not in OWN}
    for name, value in facts.items():
        if len(value) > MAX_CELL:
            raise SourceError(f"{where}: {name} has more than {MAX_CELL:,} characters; shorten it")
    try:
        options = source_options(facts)
    except SourceError as error:
        raise SourceError(f"{where}: column {_as_column(str(error))}") from None
    try:
        row = StudyRow.model_validate(
            {"number": number, "options": options, **{k: v for k, v in stated.items() if k in OWN}}
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        value = stated.get(name, "")
        raise SourceError(
            f"{where}: column {name} {value[:80]!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        ) from None
    for name, given in (("id", row.id), ("sample", row.sample)):
        if given is not None:
            check_section_id(given, f"{where}: column {name}", SourceError, RENAME)
    return row


def _as_column(message: str) -> str:
    """Return a message about an option for use after "column": without the backticks around the option's name."""
    for name in META_KEYS:
        if message.startswith(f"`{name}` "):
            return name + message.removeprefix(f"`{name}`")
    return message
