"""Download of the required files of a remote source to a local folder with the same layout.

Metadata tables are downloaded first and used to select sections; then the files of these sections are downloaded. Files are
checked by size and cached; after an interruption, the download resumes with the files that are not complete.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from comtip_shards.errors import SourceError
from comtip_shards.names import shown
from comtip_shards.sections.facts import SourceOptions
from comtip_shards.sources.base import pick
from comtip_shards.sources.files.names import by_section_id
from comtip_shards.sources.selection.choose import choose
from comtip_shards.sources.selection.layouts import LAYOUTS, Layout
from comtip_shards.storage.atomic import publish_link
from comtip_shards.storage.cache import default_cache
from comtip_shards.storage.remote import Remote, RetryPolicy

FETCHERS = 4
"""Number of files that are downloaded at the same time."""
UNBOUNDED = 1 << 62
"""Size of the cache in bytes: downloaded sources are never evicted, because a build may still read them."""
RETRIES = RetryPolicy(stall=300.0, total=24 * 3600.0)
"""Long timeouts, for listings of thousands of files and slides of many GB."""
FILE_SUFFIXES = (".h5ad", ".tsv")
MAX_PART = 200
"""Maximum bytes of one path component: file systems allow 255, and a copy has a suffix while it is written."""


@dataclass(frozen=True)
class Fetched:
    """Result of a download."""

    path: Path
    """Local path for the reader."""
    fmt: str
    """Name of the format."""
    why: str
    """How the format was determined."""
    samples: list[str] | None
    """Ids of the selected sections; None if file names of the format do not identify sections."""
    n_files: int
    n_bytes: int
    """Number and total size of the files that the sections need, including those that were cached."""


@dataclass
class _Listing:
    """Names and sizes of remote files, listed per pattern and cached."""

    remote: Remote
    _known: dict[str, dict[str, int | None]] = field(default_factory=dict)

    def match(self, pattern: str) -> dict[str, int | None]:
        """Return {name: size, None if unknown} of the files that match a pattern; only names that pass :func:`_is_inside`."""
        if pattern not in self._known:
            self._known[pattern] = {n: s for n, s in self.remote.sizes(pattern).items() if _is_inside(n)}
        return self._known[pattern]

    def needs(self, patterns: Sequence[str], section: str) -> dict[str, int | None]:
        """Return {name: size} of the files of one section; ``{id}`` in a pattern is replaced by the section.

        Raises SourceError for a pattern that leaves the folder.
        """
        out: dict[str, int | None] = {}
        for pattern in patterns:
            if not _is_inside(pattern):  # patterns may come from a table of the source
                raise SourceError(
                    f"{self.remote.url}: the table entry of section {section} names the file {shown(pattern)}, which leaves the "
                    "folder or is not a valid file name; correct the table, or download the source and give the local folder"
                )
            for name, size in self.match(pattern.replace("{id}", "*")).items():
                if "{id}" not in pattern or fnmatch.fnmatchcase(name, pattern.replace("{id}", _literal(section))):
                    out[name] = size
        return out


def _literal(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _is_inside(name: str) -> bool:
    """Return whether a listed name stays below the folder on every system and is a valid file name."""
    path = PurePosixPath(name)
    safe = name.isprintable() and "\\" not in name and all(len(part.encode()) <= MAX_PART for part in path.parts)
    return safe and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def fetch_source(
    url: str,
    *,
    fmt: str = "auto",
    samples: Sequence[str] | None = None,
    where: Mapping[str, Collection[str]] | None = None,
    options: SourceOptions | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> Fetched:
    """Download the files of a remote source that a build needs.

    Parameters
    ----------
    url
        A folder (or one ``.h5ad`` or ``manifest.tsv``) that fsspec reads: ``s3://``, ``gs://``, ``https://``,
        ``hf://datasets/OWNER/NAME``.
    fmt
        Name of the format; ``auto`` detects it by file names.
    samples, where
        As for :func:`comtip_shards.sources.open_source`.
    options
        Facts (scale, image, species, ...) and options given by the caller; ``pixels`` selects WSIs or patches of HEST, ``pool_um`` and
        ``bin_um`` the bins of Visium HD.
    cache
        Cache directory; by default ``sources`` in :func:`comtip_shards.storage.cache.default_cache`.
    progress
        Show a progress bar.

    Raises
    ------
    SourceError
        The format is not detected, a metadata table is invalid or names files outside the folder, no section matches, ``where``
        is given and there is no metadata table, or there is not enough disk space.
    ShardError
        The server failed; completed files stay in the cache.
    """
    folder, only = _split(url)
    remote = Remote(folder, cache or default_cache() / "sources", UNBOUNDED, RETRIES)
    listing = _Listing(remote)
    layout, why = _recognise(listing, url, fmt, only)
    if progress:
        tqdm.write(f"{url}: read as {layout.fmt} ({why})")
    root = remote.cache / "trees" / hashlib.sha256(remote.url.encode()).hexdigest()[:16] / _tail(remote.url)
    tables = {n: s for pattern in layout.tables for n, s in listing.match(pattern).items()}
    _fetch(remote, tables, root, None)
    chosen = _choose(layout, listing, root, url, samples, where or {}, only)
    needed = _needed(layout, listing, root, tables, chosen, options or SourceOptions())
    if only:
        needed[only] = listing.match(only).get(only)
    wanted = sum(s or 0 for s in needed.values())
    _check_disk(remote.cache, wanted, url)
    with tqdm(total=wanted, desc="downloading", unit="B", unit_scale=True, disable=None if progress else True) as bar:
        n_bytes = _fetch(remote, needed, root, bar)
    return Fetched(
        root / only if only else root,
        layout.fmt,
        why,
        chosen and [layout.section(c) for c in chosen],
        len(needed),
        n_bytes,
    )


def _split(url: str) -> tuple[str, str]:
    """Split the URL of a file into (folder, file name); for a folder, the name is ""."""
    head, _, last = url.rstrip("/").rpartition("/")
    return (head, last) if last.endswith(FILE_SUFFIXES) else (url, "")


def _tail(url: str) -> Path:
    """Return the last two path components of a URL, because a run is named after its folder or the parent of ``outs``."""
    parts = [p for p in url.split("://", 1)[1].split("?", maxsplit=1)[0].split("/") if p and p.strip(".")]
    return Path(*parts[-2:]) if parts else Path("source")


def _recognise(listing: _Listing, url: str, fmt: str, only: str) -> tuple[Layout, str]:
    if fmt != "auto":
        return LAYOUTS[fmt], "set by `fmt`"
    if only:
        kind = LAYOUTS["anndata" if only.endswith(".h5ad") else "manifest"]
        return kind, f"file name {only}"
    for layout in LAYOUTS.values():
        found = [next(iter(sorted(listing.match(mark))), "") for mark in layout.marks]
        if all(found):
            return layout, f"found {', '.join(found)}"
    known = "; ".join(f"{n}: {' and '.join(la.marks)}" for n, la in LAYOUTS.items())
    raise SourceError(
        f"{url}: unknown format. Looked for {known}. If it is one of these, set `fmt` to it. If the server "
        "cannot list files, download the source first"
    )


def _choose(
    layout: Layout,
    listing: _Listing,
    root: Path,
    url: str,
    samples: Sequence[str] | None,
    where: Mapping[str, Collection[str]],
    only: str,
) -> list[str] | None:
    """Return the selected sections as spelled in file names; None if all files are needed."""
    if layout.names is None:
        if where:
            raise SourceError(f"{url}: {layout.fmt} has no metadata table to filter by; select sections with `samples`")
        return None
    stems = layout.names(root, listing.match(only or layout.marks[0]))
    stem_of = by_section_id(stems, "file names", url, layout.section)
    ids = pick(samples, list(stem_of), url)
    rows = {row.section_id: row for row in layout.rows(root)} if layout.rows else {}
    if where and not rows:
        raise SourceError(
            f"{url}: no metadata table, so sections cannot be filtered by {', '.join(where)}; use `samples`"
        )
    if where:
        known = [rows[i] for i in ids if i in rows]
        ids = [row.section_id for row in choose(known, where, url, lambda row: row)]
    return [stem_of[i] for i in ids]


def _needed(
    layout: Layout,
    listing: _Listing,
    root: Path,
    tables: Mapping[str, int | None],
    chosen: Sequence[str] | None,
    options: SourceOptions,
) -> dict[str, int | None]:
    """Return {file: size} of the metadata tables and of the files that the chosen sections need."""
    needed = dict(tables)
    for section in chosen if chosen is not None else [""]:
        needed |= listing.needs(layout.files(root, section, options), section)
    return needed


def _check_disk(cache: Path, wanted: int, url: str) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    have = sum(f.stat().st_size for f in (cache / "trees").rglob("*") if f.is_file()) if wanted > free else 0
    if wanted - have > free:
        raise SourceError(
            f"{url}: {(wanted - have) / 1e9:.4g} GB more are needed, but only {free / 1e9:.4g} GB are free in {cache}; free space there, "
            "select fewer sections (`samples`, `where`), or set another folder (`cache`)"
        )


def _fetch(remote: Remote, files: Mapping[str, int | None], root: Path, bar: tqdm | None) -> int:
    """Download files to the cache and link them into ``root``; returns their total size in bytes."""

    def one(item: tuple[str, int | None]) -> int:
        name, size = item
        kept = remote.fetch(name, size=size)
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.exists() and target.samefile(kept)):
            publish_link(kept, target)
        n = target.stat().st_size
        if bar is not None:
            bar.update(n)
        return n

    with ThreadPoolExecutor(FETCHERS) as pool:
        return sum(pool.map(one, sorted(files.items())))
