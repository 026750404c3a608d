"""Facts that a user states about a section, and options for pooling; typed, bounded, and described once.

The command line, the Python functions and the readers all derive their options from the dataclasses here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from comtip_shards.errors import SourceError

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class SectionFacts:
    """Facts about a section. A stated fact takes precedence over anything a reader infers; ``None`` is not stated."""

    mpp: Annotated[_Positive | None, Field(description="um per px of the image that the positions belong to")] = None
    species: Annotated[Literal["human", "mouse"] | None, Field(description="species of the section")] = None
    tissue: Annotated[_Text | None, Field(description="organ, e.g. breast")] = None
    donor: Annotated[_Text | None, Field(description="patient or animal; splits keep donors apart")] = None
    platform: Annotated[_Text | None, Field(description="assay, e.g. Visium")] = None
    licence: Annotated[_Text | None, Field(description="licence of the data, e.g. CC-BY-4.0")] = None
    attribution: Annotated[_Text | None, Field(description="how the data's authors are to be credited")] = None
    pixels: Annotated[
        Literal["wsi", "patches"] | None,
        Field(
            description="HEST: cut tiles from the whole-slide image or from the patches (default: the image if present)"
        ),
    ] = None
    image: Annotated[
        _Text | None,
        Field(
            description="image to cut tiles from (Space Ranger: the original, or the word hires or lowres); "
            "{id} is replaced by the section id"
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PoolingOptions:
    """Options for pooling bins, cells and transcripts to pseudo-spots; ``None`` takes the reader's default."""

    pool_um: Annotated[
        _Positive | None,
        Field(description="width of a pseudo-spot in um (default: 128 for Visium HD, 100 for Xenium)"),
    ] = None
    pool_from: Annotated[
        Literal["bins", "cells", "transcripts"] | None,
        Field(description="what to pool: bins or cells (Visium HD), transcripts or cells (Xenium)"),
    ] = None
    bin_um: Annotated[
        _Positive | None,
        Field(description="bin size to pool, Visium HD (default: the largest that divides pool-um)"),
    ] = None
    min_cover: Annotated[
        float | None,
        Field(ge=0, le=1, description="smallest share of a pseudo-spot's bins in tissue, Visium HD (default 0.5)"),
    ] = None
    min_pooled: Annotated[
        float | None,
        Field(
            ge=0,
            description="smallest content of a pseudo-spot (default: 1 cell, or 5 % of a dense spot's transcripts)",
        ),
    ] = None
    qv: Annotated[float | None, Field(ge=0, description="smallest quality of a transcript, Xenium (default 20)")] = None
    alignment: Annotated[
        _Text | None,
        Field(description="Xenium: csv of a 3 x 3 matrix (H&E px to DAPI px), or keypoints from Xenium Explorer"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class CountOptions:
    """Where an AnnData or a SpatialData table keeps counts and positions; ``None`` lets the reader find them."""

    layer: Annotated[
        _Text | None,
        Field(description="AnnData, SpatialData: the layer with raw counts, or X or raw (default: found by content)"),
    ] = None
    positions: Annotated[
        _Text | None, Field(description="AnnData: the key of obsm with spot centres (default: spatial)")
    ] = None
    round_counts: Annotated[
        Literal["yes", "no"] | None,
        Field(description="AnnData, SpatialData: yes rounds fractional counts of ambient RNA correction (default: no)"),
    ] = None


Options = SectionFacts | PoolingOptions | CountOptions


@dataclass(frozen=True)
class OptionSpec:
    """One field as an option: its name, description, and the values it may take (empty: any)."""

    name: str
    description: str
    choices: tuple[str, ...]


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {cls: TypeAdapter(cls) for cls in (SectionFacts, PoolingOptions, CountOptions)}


def option_specs(cls: type[Options]) -> Iterator[OptionSpec]:
    """Yield the fields of a class, in order, for a command line or a table of documentation."""
    hints = get_type_hints(cls, include_extras=True)
    for item in fields(cls):
        inner, info = get_args(hints[item.name])[0], hints[item.name].__metadata__[-1]
        branches = get_args(inner) if isinstance(inner, UnionType) or get_origin(inner) is not None else (inner,)
        choices = next((get_args(b) for b in branches if get_origin(b) is Literal), ())
        yield OptionSpec(item.name, str(info.description), tuple(choices))


def parse_facts(values: Mapping[str, Any]) -> tuple[SectionFacts, PoolingOptions, CountOptions]:
    """Check stated values, which may be text (``{"mpp": "0.5"}``); ``None`` is not stated.

    Raises
    ------
    SourceError
        Unknown name, wrong type or out of bounds; names the fact, the value and what it must be.
    """
    known = {cls: {f.name for f in fields(cls)} for cls in _ADAPTERS}
    for name in values:
        if not any(name in names for names in known.values()):
            options = ", ".join(n for names in known.values() for n in sorted(names))
            raise SourceError(f"unknown fact {name!r}; these can be stated: {options}")
    given = {k: v for k, v in values.items() if v is not None}
    facts, pooling, counts = (
        _validated(cls, {k: v for k, v in given.items() if k in names}) for cls, names in known.items()
    )
    return facts, pooling, counts


def stated(*parts: Options | None) -> dict[str, str]:
    """Return what is stated, as text, for readers and for provenance."""
    out = {}
    for part in parts:
        for item in fields(part) if part is not None else ():
            value = getattr(part, item.name)
            if value is not None:
                out[item.name] = f"{value:.12g}" if isinstance(value, float) else str(value)
    return out


def _validated(cls: Any, values: dict[str, Any]) -> Any:
    try:
        return _ADAPTERS[cls].validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise SourceError(
            f"--{name.replace('_', '-')} {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        ) from None
