"""Interface of the readers: a section that is read on demand, the registry entry of a format, and options that name files."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from comtip_shards.errors import ShardError, SourceError, UnforeseenError, UnknownSection, name_origins
from comtip_shards.sections.facts import CountOptions, SectionFacts, SourceOptions
from comtip_shards.sections.section import Section, SectionMeta
from comtip_shards.sources.files.opening import existing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preview:
    """Size of a section, as far as it is known before the section is read; None for unknown values."""

    spots: int | None = None
    """Upper bound on the number of spots."""
    genes: int | None = None
    image: str = ""
    """Name of an image that is stored within another file; "" for an image file."""
    image_px: tuple[int, int] | None = None


@dataclass(frozen=True)
class SectionSource:
    """A section whose data are read on demand."""

    meta: SectionMeta
    inputs: tuple[Path, ...]
    """Input files of the section."""
    load: Callable[[], Section]
    load_spots: Callable[[], Section] | None = None
    """Loads the section without its counts; None if ``load`` is used instead."""
    counts: CountOptions = field(default_factory=CountOptions)
    """Options for counts and positions that change the content, but neither the metadata nor the input files."""

    preview: Callable[[], Preview] | None = None
    """Returns the size for a dry run; raises SourceError if a build would refuse the section. If None, file headers are read."""
    examine: Callable[[Section], None] | None = None
    """A check such as :class:`comtip_shards.sources.geometry.ScaleCheck`: raises SourceError if a valid section is implausible."""

    def read(self) -> Section:
        """Read the section and validate it.

        Raises
        ------
        SourceError
            The section cannot be read or is invalid; the message names it or one of its files.
        OSError
            A file cannot be read, for example because of its permissions.
        """
        with named(f"section {self.meta.section_id}", self.inputs):
            return self._examined(self.load().check())

    def read_spots(self) -> Section:
        """Read and validate the section for its positions and image; its counts may be absent. Raises the errors of :meth:`read`."""
        with named(f"section {self.meta.section_id}", self.inputs):
            return self._examined((self.load_spots or self.load)().check())

    def _examined(self, section: Section) -> Section:
        if self.examine is not None:
            self.examine(section)
        return section


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Registry entry for one source format."""

    name: str
    """Name of the format, as in ``fmt``."""
    looks_for: str
    """Short description of the layout, used in error messages."""
    recognise: Callable[[Path], str | None]
    """Returns a reason if a path has this format, else None. It must be fast and must not raise on other formats."""
    open: Callable[[Path, Sequence[str] | None, SourceOptions], list[SectionSource]]
    """``open(path, section ids or None for all, options)``; it must not read the data."""
    catalogue: Callable[[Path, SectionFacts], list[CatalogueRow]] | None = None
    """Lists sections from the source's metadata table without opening them; None if opening is cheap."""
    outranks: tuple[str, ...] = ()
    """Formats over which this one takes precedence if both are detected; ``*`` means all."""
    pools: bool = False
    """Whether the reader pools bins, cells or transcripts; otherwise pooling options are refused."""
    options: tuple[str, ...] = ()
    """Options that the reader uses besides :data:`comtip_shards.sections.facts.FACT_KEYS`; all others are refused."""


@dataclass(frozen=True)
class CatalogueRow:
    """Metadata of a section that is known before it is opened; used for filtering."""

    section_id: str
    species: str = ""
    tissue: str = ""
    platform: str = ""
    donor: str = ""
    dataset: str = ""

    def with_facts(self, facts: SectionFacts) -> CatalogueRow:
        """Return the row with the source's values replaced by stated facts."""
        return replace(
            self,
            species=facts.species or self.species,
            tissue=facts.tissue or self.tissue,
            platform=facts.platform or self.platform,
            donor=facts.donor or self.donor,
        )


def stated_file(template: str | None, section_id: str) -> Path | None:
    """Return the file that the caller states for a section, None if none is stated; ``{id}`` is replaced."""
    return Path(template.replace("{id}", section_id)) if template else None


def stated_image(facts: SectionFacts, section_id: str) -> Path | None:
    """Return the image that the caller states for a section, or None; raises SourceError if the file is missing or not data."""
    image = stated_file(facts.image, section_id)
    return None if image is None else existing(image, "image (`image`)")


def check_one_file(option: str, template: str | None, names: Sequence[str], where: Path) -> None:
    """Raise :class:`SourceError` if one file is stated for several sections.

    Parameters
    ----------
    option
        Name of the option, e.g. ``image``.
    template
        Its value, with ``{id}`` for the section.
    names
        The sections that are read.
    where
        The source, for messages.
    """
    if template and len(names) > 1 and "{id}" not in template:
        raise SourceError(
            f"{where}: `{option}` is one file but there are {len(names)} sections; use {{id}} in it, or select one with `samples`"
        )


def pick(wanted: Sequence[str] | None, have: Sequence[str], where: Path | str) -> list[str]:
    """Return the requested section ids, or all in ``have`` if ``wanted`` is None.

    Raises
    ------
    UnknownSection
        An id is not in ``have``; the message names the closest one and ``where``.
    SourceError
        ``wanted`` is empty although there are sections.
    """
    if wanted is None:
        return list(have)
    if not wanted and have:
        raise SourceError(
            f"{where}: `samples` names no section; give ids such as {', '.join(have[:3])}, or leave it out"
        )
    for name in wanted:
        if name not in have:
            near = difflib.get_close_matches(name, have, n=1, cutoff=0)
            raise UnknownSection(
                f"{where}: no section {name!r}; {f'did you mean {near[0]}? The sections are' if near else 'the sections are'}: "
                + (", ".join(have[:20]) or "none")
                + (f" and {len(have) - 20} more" if len(have) > 20 else "")
            )
    return list(wanted)


@contextmanager
def named(what: str, inputs: Sequence[Path]) -> Iterator[None]:
    """Context in which every error names the section or one of its files.

    Parameters
    ----------
    what
        The section or the source.
    inputs
        Its files; a message that names one of them is not changed.

    Raises
    ------
    SourceError
        As raised inside, with ``what`` prepended if the message names no file. It also replaces a MemoryError, and an OSError that
        names a temporary copy: the new message names the packed file.
    ShardError, OSError
        As raised inside: the messages name the file.
    UnforeseenError
        Replaces any other error.
    """
    try:
        yield
    except SourceError as error:
        text = str(error)
        if "section " in text or "/" in text or any(p.name in text for p in inputs):
            raise
        raise type(error)(f"{what}: {text}") from error
    except OSError as error:
        if name_origins(str(error)) == str(error):
            raise
        raise SourceError(f"{what}: {error}; check that its files are complete") from error
    except ShardError:
        raise
    except MemoryError as error:
        raise SourceError(
            f"{what}: too large for the memory of this machine ({error}); close other programs, or use a machine with more memory"
        ) from error
    except Exception as error:  # the last resort: every known cause is refused where it occurs
        log.debug("%s: unforeseen error", what, exc_info=True)
        text = str(error).splitlines()[0] if str(error) else "no message"
        raise UnforeseenError(
            f"{what}: cannot be read ({type(error).__name__}: {text}); check that its files are complete and unchanged, and "
            "report this if they are"
        ) from error
