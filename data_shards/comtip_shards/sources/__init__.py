"""Readers for section formats. The module of a format detects it and opens its sections lazily.

To add a format, write one module and add one entry to ``READERS``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from comtip_shards.errors import SourceError
from comtip_shards.sections.facts import POOL_KEYS, SourceOptions, check_options, check_trust, refuse, source_options
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
from comtip_shards.sources.base import Reader, SectionSource, named, pick
from comtip_shards.sources.files.packaging import contents
from comtip_shards.sources.selection.choose import check_where, choose
from comtip_shards.sources.selection.fetch import fetch_source
from comtip_shards.sources.selection.hints import explain
from comtip_shards.storage.remote import is_url

__all__ = ["FORMATS", "READERS", "SectionSource", "detect", "open_source"]

READERS = (
    Reader(
        name="manifest",
        looks_for="a manifest.tsv with a column sample_id",
        recognise=manifest_table.recognise,
        open=manifest_table.open_sections,
        options=("trust_mpp",),
        outranks=("*",),
    ),
    Reader(
        name="space_ranger",
        options=("image",),
        looks_for="a Space Ranger folder with spatial/",
        recognise=space_ranger.recognise,
        open=space_ranger.open_sections,
    ),
    Reader(
        name="visium_hd",
        options=("image", *POOL_KEYS),
        looks_for="binned_outputs/square_016um or segmented_outputs (Visium HD)",
        recognise=visium_hd.recognise,
        open=visium_hd.open_sections,
        outranks=("space_ranger",),
        pools=True,
    ),
    Reader(
        name="hest",
        options=("image", "pixels", "trust_mpp"),
        looks_for="st/ID.h5ad with wsis/ or patches/ (HEST-1k)",
        recognise=hest.recognise,
        open=hest.open_sections,
        catalogue=hest.catalogue,
    ),
    Reader(
        name="stimage",
        options=("image", "trust_mpp"),
        looks_for="ST/, Visium/ or VisiumHD/ with coord/SLIDE_coord.csv (STimage-1K4M)",
        recognise=stimage.recognise,
        open=stimage.open_sections,
        catalogue=stimage.catalogue,
    ),
    Reader(
        name="spatialdata",
        options=("image", "trust_mpp", "layer", "round_counts"),
        looks_for="a SpatialData store (.zarr)",
        recognise=spatialdata_source.recognise,
        open=spatialdata_source.open_sections,
    ),
    Reader(
        name="anndata",
        options=("image", "trust_mpp", "layer", "positions", "round_counts"),
        looks_for="an .h5ad with obsm['spatial'], or a folder of them",
        recognise=anndata_source.recognise,
        open=anndata_source.open_sections,
    ),
    Reader(
        name="xenium",
        options=("image", *POOL_KEYS),
        looks_for="experiment.xenium with transcripts.parquet or cells.parquet",
        recognise=xenium.recognise,
        open=xenium.open_sections,
        pools=True,
    ),
    Reader(
        name="legacy_st",
        options=("image", "trust_mpp"),
        looks_for="count tables ID.tsv.gz with images ID_*.jpg",
        recognise=legacy_st.recognise,
        open=legacy_st.open_sections,
    ),
)
MAX_DEPTH = 4
"""Number of nested folders that :func:`locate` enters."""
_BY_NAME = {reader.name: reader for reader in READERS}
FORMATS = tuple(_BY_NAME)


def detect(path: Path) -> tuple[Reader, str]:
    """Detect the format of ``path``.

    Returns
    -------
    The reader, and the reason for which it accepts the path: the files or attributes that it found.

    Raises
    ------
    SourceError
        No reader accepts the path, or several do and none takes precedence over the others.
    """
    path = locate(path)
    found = {r.name: why for r in READERS if (why := r.recognise(path))}
    outranked = {
        other
        for name in found
        for other in found
        if other != name and (other in _BY_NAME[name].outranks or "*" in _BY_NAME[name].outranks)
    }
    left = {name: why for name, why in found.items() if name not in outranked}
    if not left:
        raise SourceError(f"{path}: {explain(path, READERS)}")
    if len(left) > 1:
        seen = "; ".join(f"{name}: {why}" for name, why in left.items())
        raise SourceError(f"{path}: could be more than one format ({seen}); set `fmt` to {' or '.join(left)}")
    name, why = next(iter(left.items()))
    return _BY_NAME[name], why


def locate(path: Path) -> Path:
    """Return ``path``, or the folder within it that holds the data.

    The search begins at ``path`` and descends until a reader accepts the folder: into ``outs`` if it exists, otherwise into the
    only entry of the folder. It ends at a folder that has neither, and enters at most :data:`MAX_DEPTH` folders.
    """
    for _ in range(MAX_DEPTH):
        if not path.is_dir() or any(r.recognise(path) for r in READERS):
            return path
        entries = contents(path)
        inner = path / "outs"
        if not inner.is_dir() and len(entries) == 1 and entries[0].is_dir():
            inner = entries[0]
        if not inner.is_dir():
            return path
        path = inner
    return path


def open_source(
    path: Path | str,
    *,
    samples: Sequence[str] | None = None,
    fmt: str = "auto",
    overrides: SourceOptions | Mapping[str, Any] | None = None,
    where: Mapping[str, Collection[str]] | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> list[SectionSource]:
    """Open the sections of a source without reading them.

    Parameters
    ----------
    path
        A table, a file or a folder, or the URL of one, from which the required files are downloaded first.
    samples
        Section ids to read; None reads all.
    fmt
        ``auto`` or one of :data:`FORMATS`.
    overrides
        Facts (scale, image, species, ...) and options given by the caller; facts take precedence over the source. A mapping such
        as ``{"mpp": "0.5"}`` is parsed by :func:`comtip_shards.sections.facts.source_options`.
    where
        Allowed values by field; only sections that match all of them are opened, e.g. ``{"tissue": ["breast", "lung"],
        "species": ["human"]}``. Fields: ``species``, ``tissue`` (or ``organ``), ``platform`` (or ``technology``),
        ``donor`` and ``dataset``.
    cache
        Cache directory for downloads, see :func:`comtip_shards.sources.selection.fetch.fetch_source`.
    progress
        Show a progress bar for downloads.

    Returns
    -------
    The selected sections, each of which is read by ``read()``.

    Raises
    ------
    SourceError
        The source cannot be read, or an option is invalid or unused; the message names the file and the fix.
    ShardError
        The server of a URL failed.
    """
    options, where = source_options(overrides), check_where(where or {})
    if fmt != "auto" and fmt not in _BY_NAME:
        raise SourceError(f"`fmt` {fmt!r} is unknown; use auto or one of {', '.join(FORMATS)}")
    if is_url(path):
        fetched = fetch_source(
            str(path), fmt=fmt, samples=samples, where=where, options=options, cache=cache, progress=progress
        )
        path, fmt, samples = fetched.path, fetched.fmt, fetched.samples
        if "pixels" not in _BY_NAME[fmt].options:  # the option was used to select the downloads
            options = replace(options, facts=replace(options.facts, pixels=None))
    path = Path(path)
    if not path.exists():
        what = "a link to a path that does not exist" if path.is_symlink() else "no such file or folder"
        raise SourceError(f"{path}: {what}; correct the path, or copy the source there")
    with named(str(path), ()):
        path = locate(path)
        return _read_by(detect(path)[0] if fmt == "auto" else _BY_NAME[fmt], path, samples, where, options)


def _read_by(
    reader: Reader,
    path: Path,
    samples: Sequence[str] | None,
    where: Mapping[str, Collection[str]],
    options: SourceOptions,
) -> list[SectionSource]:
    """Check that the reader uses every stated option, and open the selected sections of a local source."""
    check_trust(options.facts)
    if not reader.pools:
        refuse(options, POOL_KEYS, f"the format {reader.name} has spots, which are not pooled")
    check_options(options, reader.options, f"the format {reader.name}")
    if reader.catalogue is None:
        return choose(reader.open(path, samples, options), where, path, lambda source: source.meta)
    rows = reader.catalogue(path, options.facts)
    wanted = set(pick(samples, [r.section_id for r in rows], path))
    rows = choose([r for r in rows if r.section_id in wanted], where, path, lambda row: row)
    return reader.open(path, [r.section_id for r in rows], options)
