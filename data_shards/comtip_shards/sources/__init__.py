"""Readers of tissue sections. Each module recognises its format and opens its sections lazily.

A new format is one module and one entry in ``READERS``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from comtip_shards.errors import SourceError
from comtip_shards.sources import (
    anndata_source,
    hest,
    legacy_st,
    manifest_table,
    space_ranger,
    spatialdata_source,
    stimage,
    visium_hd,
    xenium,
)
from comtip_shards.sources.base import POOL_KEYS, Reader, SectionSource, check_overrides, pick, refuse
from comtip_shards.sources.choose import check_where, choose
from comtip_shards.sources.fetch import fetch_source
from comtip_shards.storage.remote import is_url

__all__ = ["FORMATS", "READERS", "SectionSource", "detect", "open_source"]

READERS = (
    Reader(
        name="manifest", looks_for="a manifest.tsv with a column sample_id", recognise=manifest_table.recognise,
        open=manifest_table.open_sections, outranks=("*",),
    ),
    Reader(
        name="space_ranger", looks_for="a folder with spatial/ from Space Ranger", recognise=space_ranger.recognise,
        open=space_ranger.open_sections,
    ),
    Reader(
        name="visium_hd", looks_for="binned_outputs/square_016um or segmented_outputs of Visium HD",
        recognise=visium_hd.recognise, open=visium_hd.open_sections, outranks=("space_ranger",), pools=True,
    ),
    Reader(
        name="hest", looks_for="st/ID.h5ad beside wsis/ or patches/ of HEST-1k", recognise=hest.recognise,
        open=hest.open_sections, catalogue=hest.catalogue,
    ),
    Reader(
        name="stimage", looks_for="ST, Visium or VisiumHD with coord/SLIDE_coord.csv of STimage-1K4M",
        recognise=stimage.recognise, open=stimage.open_sections, catalogue=stimage.catalogue,
    ),
    Reader(
        name="spatialdata", looks_for="a SpatialData store (.zarr)", recognise=spatialdata_source.recognise,
        open=spatialdata_source.open_sections,
    ),
    Reader(
        name="anndata", looks_for="an .h5ad with obsm['spatial'], or a folder of them", recognise=anndata_source.recognise,
        open=anndata_source.open_sections,
    ),
    Reader(
        name="xenium", looks_for="experiment.xenium with transcripts.parquet or cells.parquet",
        recognise=xenium.recognise, open=xenium.open_sections, pools=True,
    ),
    Reader(
        name="legacy_st", looks_for="count tables ID.tsv.gz with images ID_*.jpg", recognise=legacy_st.recognise,
        open=legacy_st.open_sections,
    ),
)  # fmt: skip
_BY_NAME = {reader.name: reader for reader in READERS}
FORMATS = tuple(_BY_NAME)


def detect(path: Path) -> tuple[Reader, str]:
    """Return the reader that knows ``path`` and why it does.

    Raises
    ------
    SourceError
        No reader knows it, or more than one does; the message says what was looked for and what was found.
    """
    found = {r.name: why for r in READERS if (why := r.recognise(path))}
    outranked = {
        other
        for name in found
        for other in found
        if other != name and (other in _BY_NAME[name].outranks or "*" in _BY_NAME[name].outranks)
    }
    left = {name: why for name, why in found.items() if name not in outranked}
    if not left:
        known = "; ".join(f"{r.name}: {r.looks_for}" for r in READERS)
        raise SourceError(f"{path}: no known format. Looked for {known}. If it is one of these, force it with --format")
    if len(left) > 1:
        seen = "; ".join(f"{name}: {why}" for name, why in left.items())
        raise SourceError(f"{path}: could be more than one format ({seen}); choose with --format {'|'.join(left)}")
    name, why = next(iter(left.items()))
    return _BY_NAME[name], why


def open_source(
    path: Path | str, *, samples: Sequence[str] | None = None, fmt: str = "auto",
    overrides: Mapping[str, str] | None = None, where: Mapping[str, Collection[str]] | None = None,
    cache: Path | None = None, progress: bool = False,
) -> list[SectionSource]:  # fmt: skip
    """Open the sections of a source, without reading them yet.

    Parameters
    ----------
    path
        A table, a file or a folder; or the URL of one, of which what is needed is fetched first.
    samples
        Section ids to take; None takes all.
    fmt
        ``auto`` or one of :data:`FORMATS`.
    overrides
        Facts that the source does not state: species, tissue, donor, platform, licence, attribution, mpp, image.
    where
        Take only sections of these values, e.g. ``{"tissue": ["breast", "lung"], "species": ["human"]}``; the keys
        are ``species``, ``tissue`` (or ``organ``), ``platform`` (or ``technology``), ``donor`` and ``dataset``.
    cache
        Where files behind a URL are kept, see :func:`comtip_shards.sources.fetch.fetch_source`.
    progress
        Show a bar on a terminal while files are fetched.

    Raises
    ------
    SourceError
        Naming the file and the fix.
    """
    facts, where = dict(overrides or {}), check_where(where or {})
    check_overrides(facts)
    if fmt != "auto" and fmt not in _BY_NAME:
        raise SourceError(f"unknown format {fmt!r}; use auto or one of {', '.join(FORMATS)}")
    if is_url(path):
        fetched = fetch_source(
            str(path), fmt=fmt, samples=samples, where=where, facts=facts, cache=cache, progress=progress
        )
        path, fmt, samples = fetched.path, fetched.fmt, fetched.samples
    path = Path(path)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    reader = detect(path)[0] if fmt == "auto" else _BY_NAME[fmt]
    if not reader.pools:
        refuse(facts, POOL_KEYS, f"{reader.name} is read spot by spot")
    if reader.catalogue is None:
        return choose(reader.open(path, samples, facts), where, path, lambda source: source.meta)
    rows = reader.catalogue(path, facts)
    wanted = set(pick(samples, [r.section_id for r in rows], path))
    rows = choose([r for r in rows if r.section_id in wanted], where, path, lambda row: row)
    return reader.open(path, [r.section_id for r in rows], facts)
