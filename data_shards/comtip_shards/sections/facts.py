"""Facts that a user states about a section, and options for reading it, as typed and validated dataclasses.

The command line, the Python functions and the readers all derive their options from the dataclasses here. Text is parsed
in this module only; readers take :class:`SourceOptions`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from comtip_shards.errors import SourceError
from comtip_shards.genes.species import species_name

Species = Literal["human", "mouse"]
PixelSource = Literal["wsi", "patches"]
PooledUnit = Literal["bins", "cells", "transcripts"]


def _as_species(value: Any) -> Any:
    return species_name(value) if isinstance(value, str) else value


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def lowered(value: Any) -> Any:
    """Return text in lower case: spreadsheets and people write names of options as ``Bins`` or ``Train``."""
    return value.strip().lower() if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Text = Annotated[str, BeforeValidator(_stripped), Field(min_length=1)]
_Location = Annotated[str, BeforeValidator(_as_text), Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class SectionFacts:
    """What a caller states about a section: scale, images, species, donor and other metadata; ``None`` means not stated.

    A stated fact takes precedence over what a reader finds.
    """

    mpp: Annotated[_Positive | None, Field(description="um per px of the image that the positions belong to")] = None
    trust_mpp: Annotated[
        bool | None,
        Field(
            description="use mpp although the file, the spacing of the spots or the image contradicts it (default: no)"
        ),
    ] = None
    species: Annotated[Species | None, BeforeValidator(_as_species), Field(description="species of the section")] = None
    tissue: Annotated[_Text | None, Field(description="organ, e.g. breast")] = None
    donor: Annotated[
        _Text | None, Field(description="patient or animal; a donor may not be in both training and test")
    ] = None
    platform: Annotated[_Text | None, Field(description="assay, e.g. Visium")] = None
    licence: Annotated[_Text | None, Field(description="licence of the data, e.g. CC-BY-4.0")] = None
    attribution: Annotated[_Text | None, Field(description="credit to the authors of the data")] = None
    pixels: Annotated[
        PixelSource | None,
        BeforeValidator(lowered),
        Field(
            description="HEST: cut tiles from the whole-slide image or from the patches (default: the image if present)"
        ),
    ] = None
    image: Annotated[
        _Location | None,
        Field(
            description="image to cut tiles from (Space Ranger: the original, or the word hires or lowres); "
            "{id} is replaced by the section id"
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PoolingOptions:
    """Options for pooling bins, cells and transcripts to pseudo-spots; ``None`` selects the reader's default."""

    pool_um: Annotated[
        _Positive | None,
        Field(description="width of a pseudo-spot in um (default: 128 for Visium HD, 100 for Xenium)"),
    ] = None
    pool_from: Annotated[
        PooledUnit | None,
        BeforeValidator(lowered),
        Field(description="what to pool: bins or cells (Visium HD), transcripts or cells (Xenium)"),
    ] = None
    bin_um: Annotated[
        _Positive | None,
        Field(description="bin size to pool, Visium HD (default: the largest that divides the pseudo-spot's width)"),
    ] = None
    min_cover: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            allow_inf_nan=False,
            description="smallest share of a pseudo-spot's bins in tissue, Visium HD (default 0.5)",
        ),
    ] = None
    min_pooled: Annotated[
        int | None,
        Field(
            ge=1,
            description="smallest number of cells or transcripts in a pseudo-spot (default: 1 cell, or 5 % of a dense spot's transcripts)",
        ),
    ] = None
    qv: Annotated[
        float | None,
        Field(ge=0, allow_inf_nan=False, description="smallest quality of a transcript, Xenium (default 20)"),
    ] = None
    alignment: Annotated[
        _Location | None,
        Field(description="Xenium: csv of a 3 x 3 matrix (H&E px to DAPI px), or keypoints from Xenium Explorer"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class CountOptions:
    """Location of counts and positions in an AnnData or a SpatialData table; ``None`` lets the reader find them."""

    layer: Annotated[
        _Text | None,
        Field(description="AnnData, SpatialData: the layer with raw counts, or X or raw (default: found by content)"),
    ] = None
    positions: Annotated[
        _Text | None,
        Field(description="AnnData: the key of obsm with spot centres (default: spatial, else another usual name)"),
    ] = None
    round_counts: Annotated[
        bool | None,
        Field(
            description="AnnData, SpatialData: round the fractional counts of an ambient RNA correction (default: no)"
        ),
    ] = None


Options = SectionFacts | PoolingOptions | CountOptions


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """All facts and options that a caller states about a source; :func:`source_options` validates the values."""

    facts: SectionFacts = field(default_factory=SectionFacts)
    pooling: PoolingOptions = field(default_factory=PoolingOptions)
    counts: CountOptions = field(default_factory=CountOptions)

    def stated(self) -> dict[str, str]:
        """Return the stated values as text, by name."""
        return stated(self.facts, self.pooling, self.counts)


@dataclass(frozen=True)
class OptionSpec:
    """Name, description and allowed values (empty: any) of one field, for an option on a command line."""

    name: str
    description: str
    choices: tuple[str, ...]


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {cls: TypeAdapter(cls) for cls in (SectionFacts, PoolingOptions, CountOptions)}


def option_specs(cls: type[Options]) -> Iterator[OptionSpec]:
    """Yield one option per field of a class, in order, for a command line or a documentation table."""
    hints = get_type_hints(cls, include_extras=True)
    for item in fields(cls):
        inner, info = get_args(hints[item.name])[0], hints[item.name].__metadata__[-1]
        branches = get_args(inner) if isinstance(inner, UnionType) or get_origin(inner) is not None else (inner,)
        choices = next((get_args(b) for b in branches if get_origin(b) is Literal), ())
        yield OptionSpec(item.name, str(info.description), ("yes", "no") if bool in branches else tuple(choices))


def option_names(cls: type[Options]) -> tuple[str, ...]:
    """Return the names of the fields of a class, in order."""
    return tuple(item.name for item in fields(cls))


POOL_KEYS = option_names(PoolingOptions)
OPTION_KEYS = ("image", "pixels", "trust_mpp", *option_names(CountOptions))
"""Fields that only some readers use."""
FACT_KEYS = tuple(name for name in option_names(SectionFacts) if name not in OPTION_KEYS)
"""Facts about a section, which every reader accepts."""
META_KEYS = (*FACT_KEYS, *OPTION_KEYS, *POOL_KEYS)
"""All fields of the three classes."""


def parse_facts(values: Mapping[str, Any]) -> tuple[SectionFacts, PoolingOptions, CountOptions]:
    """Return validated facts and options from values, which may be text (``{"mpp": "0.5"}``); ``None`` means not stated.

    Raises
    ------
    SourceError
        A name is unknown, or a value has a wrong type or is out of bounds; the message states the fact, the value and what
        it must be.
    """
    known = {cls: option_names(cls) for cls in _ADAPTERS}
    every = [name for names in known.values() for name in names]
    for name in values:
        if name not in every:
            near = difflib.get_close_matches(name, every, n=1)
            meant = f"; did you mean {near[0]}? The facts are" if near else "; use one of"
            raise SourceError(f"unknown fact {name!r}{meant} {', '.join(every)}")
    given = {k: v for k, v in values.items() if v is not None}
    facts, pooling, counts = (
        _validated(cls, {k: v for k, v in given.items() if k in names}) for cls, names in known.items()
    )
    return facts, pooling, counts


def source_options(given: SourceOptions | Mapping[str, Any] | None) -> SourceOptions:
    """Return validated options.

    Parameters
    ----------
    given
        Options, which are validated again because a dataclass accepts any value; or {name: value or text}, in which empty
        text means not stated; or None.

    Raises
    ------
    SourceError
        As for :func:`parse_facts`.
    """
    if isinstance(given, SourceOptions):
        values = {k: v for part in (given.facts, given.pooling, given.counts) for k, v in vars(part).items()}
    else:
        values = {k: None if v == "" else v for k, v in (given or {}).items()}
    facts, pooling, counts = parse_facts(values)
    return SourceOptions(facts=facts, pooling=pooling, counts=counts)


def check_options(options: SourceOptions, used: Collection[str], what: str) -> None:
    """Raise for options that a reader would ignore.

    Parameters
    ----------
    options
        Facts (scale, image, species, ...) and options given by the caller.
    used
        Fields that the reader uses besides :data:`FACT_KEYS`.
    what
        What is read, for messages.

    Raises
    ------
    SourceError
        A stated option is neither in ``used`` nor in :data:`FACT_KEYS`; the message names it.
    """
    for name in options.stated():
        if name not in FACT_KEYS and name not in used:
            raise SourceError(f"`{name}` has no effect here: {what} does not use it; leave it out")


def check_trust(facts: SectionFacts) -> None:
    """Raise :class:`SourceError` if ``trust_mpp`` is stated without ``mpp``."""
    if facts.trust_mpp is not None and facts.mpp is None:
        raise SourceError("`trust_mpp` has no effect here: no `mpp` is stated; state `mpp`, or leave `trust_mpp` out")


def refuse(options: SourceOptions, names: Collection[str], why: str) -> None:
    """Raise :class:`SourceError` if one of the options ``names`` is stated; ``why`` completes the message."""
    for name in options.stated():
        if name in names:
            raise SourceError(f"`{name}` has no effect here: {why}; leave it out")


def stated(*parts: Options | None) -> dict[str, str]:
    """Return the stated values as text, by name, for messages and provenance."""
    out = {}
    for part in parts:
        for name, value in vars(part).items() if part is not None else ():
            if value is not None:
                out[name] = _text(value)
    return out


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _validated(cls: Any, values: Mapping[str, Any]) -> Any:
    try:
        return _ADAPTERS[cls].validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        choices = next(spec.choices for spec in option_specs(cls) if spec.name == name)
        if choices:
            *most, last = (repr(choice) for choice in choices)
            must = f"must be {', '.join(most)} or {last}"
        else:
            must = re.sub(r"^\w+ should", "must", first["msg"])
            must = "must not be empty" if first["type"] in ("too_short", "string_too_short") else must
        raise SourceError(f"`{name}` {str(values[name]).strip() or repr(values[name])}: {must}") from None
