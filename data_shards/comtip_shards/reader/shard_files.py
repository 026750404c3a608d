"""Access to the files of a shard set in a folder or at a URL."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from comtip_shards.errors import ShardError
from comtip_shards.format.manifest import NAME, Manifest, parse_manifest, read_manifest
from comtip_shards.names import inside
from comtip_shards.storage.cache import SIZE_VARIABLE
from comtip_shards.storage.regular_file import read_regular
from comtip_shards.storage.remote import NoRangesError, Remote, is_url

log = logging.getLogger("comtip_shards")


class SetFiles:
    """Access to the files of a local or remote shard set.

    Parameters
    ----------
    path
        The folder of the set, or its URL.
    remote
        Cache, timeouts and credentials for a URL; ignored for a folder or a ``file://`` URL.

    Attributes
    ----------
    remote
        The remote folder, None for a local set.
    name
        The folder or URL, for error messages.
    folder
        A local folder with at least ``manifest.json``; for a URL, :meth:`manifest` sets it.
    ranges
        Whether parts of a remote shard that is not in the cache are requested by byte ranges. If False, the whole shard is
        fetched into the cache.
    """

    def __init__(self, path: Path | str, remote: Remote | None = None) -> None:
        self.remote: Remote | None = None
        self._paths: dict[str, Path] = {}
        self.ranges = False
        if not is_url(path):
            self.folder = Path(path)
        elif str(path).lower().startswith("file://"):
            self.folder = Path(unquote(urlsplit(str(path)).path))
        else:
            self.remote = remote or Remote(str(path))
        self.name = str(self.folder) if self.remote is None else self.remote.url

    def manifest(self) -> Manifest:
        """Read the manifest. The manifest of a remote set is fetched at every call and stored in :attr:`folder`.

        Raises
        ------
        ShardError
            The manifest is missing, cannot be fetched, or is unsupported or damaged.
        """
        if self.remote is None:
            return read_manifest(self.folder)
        text = self.remote.read(NAME)
        manifest = parse_manifest(text, f"{self.name}/{NAME}")
        key = hashlib.sha256(self.name.encode() + text).hexdigest()
        self.folder = self.remote.keep(key, NAME, text).parent
        return manifest

    def path(self, name: str, sha256: str, size: int | None = None) -> Path:
        """Return the local path of a file; a remote file is fetched and checked against ``sha256``.

        Raises
        ------
        ShardError
            The file cannot be fetched, or its name leaves the folder. Whether a local file exists is not checked.
        """
        if self.remote is not None:
            return self.remote.fetch(name, sha256=sha256, size=size)
        if name not in self._paths:
            self._paths[name] = inside(self.folder, name)
        return self._paths[name]

    def open(self, name: str, sha256: str, size: int) -> FileIO:
        """Open a shard for random access, without a buffer; a remote shard is fetched first.

        Raises
        ------
        ShardError
            The shard is missing or cannot be fetched.
        """
        for _ in range(3):
            try:
                return FileIO(self.path(name, sha256, size))
            except FileNotFoundError:
                if self.remote is None:
                    break
                # Another process evicted the file before it was opened: fetch it again.
        fix = "copy it back or build the set again"
        if self.remote is not None:
            fix = f"other processes evict it from the cache {self.remote.cache}: set {SIZE_VARIABLE} to a larger size"
        raise ShardError(f"{self.name}/{name}: the shard is missing; {fix}", kind="vanished")

    @contextmanager
    def by_ranges(self) -> Iterator[None]:
        """Read remote shards by byte ranges inside the block, which suits a few records of many shards."""
        before, self.ranges = self.ranges, True
        try:
            yield
        finally:
            self.ranges = self.ranges and before

    def read_spans(self, name: str, sha256: str, size: int, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yield the bytes of each span (start, stop) of a shard; a span that extends beyond the end gives fewer bytes.

        Raises
        ------
        ShardError
            The shard is missing or cannot be fetched.
        """
        if self.ranges and self.remote is not None and not self.remote.cached(sha256, name, size):
            try:
                yield from self.remote.read_ranges(name, [(low, min(high, size)) for low, high in spans])
                return
            except NoRangesError as error:
                log.warning("%s; fetching whole shards instead", error)
                self.ranges = False
        with self.open(name, sha256, size) as file:
            for low, high in spans:
                yield _read_at(file.fileno(), low, high - low)

    def verified(self, name: str, sha256: str, what: str, kind: str) -> bytes:
        """Return the content of a small file after checking its hash.

        Parameters
        ----------
        name, sha256
            File name and expected hash, from the manifest.
        what
            Description of the file for error messages, such as ``the gene table``.
        kind
            Kind of the :class:`ShardError`.

        Raises
        ------
        ShardError
            The file is missing, cannot be read or fetched, or its hash does not match.
        """
        for _ in range(2):
            path, problem = self.path(name, sha256), "does not match its SHA-256 in the manifest"
            try:
                data = read_regular(path)
            except OSError as error:
                problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
                break
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
            if not self.forget(sha256):
                break
        raise ShardError(f"{self.name}/{name}: {what} {problem}; {self.again('it')}", kind=kind)

    def again(self, what: str) -> str:
        """Return what to do about a damaged file, for error messages."""
        return (
            f"copy {what} again"
            if self.remote is None
            else f"upload {what} again, or report it to the owner of the set"
        )

    def forget(self, sha256: str) -> bool:
        """Remove the cached copy of a remote file, so that it is fetched again; return whether the set is remote."""
        if self.remote is None:
            return False
        self.remote.forget(sha256)
        return True


def _read_at(file: int, offset: int, size: int) -> bytes:
    """Read ``size`` bytes of an open file, or fewer at its end."""
    data = os.pread(file, size, offset)
    while 0 < len(data) < size:  # the end of the file, or an interrupted call
        more = os.pread(file, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
