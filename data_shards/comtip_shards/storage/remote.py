"""Files behind a URL: fetched once into a cache of bounded size, checked, and never waited for without end.

Anything that fsspec reads will do: ``s3://``, ``gs://``, ``https://``, ``hf://datasets/OWNER/NAME``, ``memory://``. What a
protocol needs besides the URL (a key, ``anon``) comes from its own environment or from fsspec's configuration
(``FSSPEC_S3_ANON=true``, ``~/.config/fsspec/conf.json``), or is given as ``storage_options``.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from comtip_shards.errors import ShardError
from comtip_shards.storage.cache import FileCache, default_cache, default_size

T = TypeVar("T")
_CHUNK = 1 << 20
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
GIB = 2**30


def is_url(path: str | Path) -> bool:
    """Tell a URL from a path; ``file://`` is one."""
    return _URL.match(str(path)) is not None


@dataclass(frozen=True)
class RetryPolicy:
    """How long to wait for a remote, in seconds."""

    attempts: int = 5
    stall: float = 30.0
    """Without one more byte, an attempt is given up."""
    total: float = 3600.0
    """For one file, all attempts together."""
    backoff: float = 0.5
    """Pause after the first failure; doubled after each, 30 at most."""


@dataclass
class Remote:
    """A folder behind a URL.

    Parameters
    ----------
    url
        The folder.
    cache
        Where files are kept; by default :func:`default_cache`. Processes may share it.
    max_bytes
        The cache's size, by default :func:`default_size`; files not used for longest go first.
    patience
        Retries and timeouts.
    storage_options
        Passed to fsspec's file system.
    """

    url: str
    cache: Path = field(default_factory=default_cache)
    max_bytes: int = field(default_factory=default_size)
    patience: RetryPolicy = field(default_factory=RetryPolicy)
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    _fs: tuple[int, Any, str] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self.cache = Path(self.cache)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fs": None}

    def fetch(self, name: str, *, sha256: str = "", size: int | None = None, limit: int | None = None) -> Path:
        """Return a local copy of ``url/name``, from the cache where it is there.

        Parameters
        ----------
        name
            Path below the URL; "" for the URL itself.
        sha256, size
            What the bytes must be, where that is known; other bytes are fetched again, then refused.
        limit
            Refuse a file of more bytes (default: the cache's size).

        Raises
        ------
        ShardError
            Of kind ``vanished`` (no such file), ``checksum`` (other bytes) or ``remote``, naming the URL and the fix.
        """
        where = self._name(name)
        deadline = time.monotonic() + self.patience.total
        key = sha256 or self._version(name, where, deadline)
        files = self._files
        path = files.path(key, name or self.url)
        if files.has(path, size):
            return path
        bound = min(limit or self.max_bytes, self.max_bytes)
        with files.locked(key, where, deadline), files.tmp_path() as tmp_path:
            if not files.has(path, size):
                self._download(name, where, tmp_path, sha256, size, bound, deadline)
                files.put(tmp_path, path)
        return path

    def read(self, name: str, *, limit: int = GIB) -> bytes:
        """Return the bytes of a small file as they are now, past the cache."""
        deadline = time.monotonic() + self.patience.total
        with self._files.tmp_path() as tmp_path:
            self._download(name, self._name(name), tmp_path, "", None, limit, deadline)
            return tmp_path.read_bytes()

    def names(self, pattern: str = "**") -> list[str]:
        """Return the files below the URL that match a glob pattern, sorted; not every https server can list."""
        return sorted(self.sizes(pattern))

    def sizes(self, pattern: str = "**") -> dict[str, int | None]:
        """Return the files of :meth:`names` with their bytes, None where the server does not say."""
        fs, root = self._filesystem()
        deadline = time.monotonic() + self.patience.total
        where = self._name(pattern)
        found = self._retry(
            where, deadline, lambda: self._call(lambda: fs.glob(f"{root}/{pattern}", detail=True), deadline)
        )
        return {
            str(path)[len(root) :].lstrip("/"): None if info.get("size") is None else int(info["size"])
            for path, info in found.items()
            if info.get("type") != "directory"
        }

    def keep(self, key: str, name: str, data: bytes) -> Path:
        """Put bytes that were read already into the cache; returns their path."""
        files = self._files
        path = files.path(key, name)
        with files.tmp_path() as tmp_path:
            try:
                tmp_path.write_bytes(data)
            except OSError as error:
                raise files.unwritable(error) from error
            files.put(tmp_path, path)
        return path

    def forget(self, sha256: str) -> None:
        """Drop a file from the cache, because its copy turned out to be damaged."""
        self._files.forget(sha256)

    @property
    def _files(self) -> FileCache:
        return FileCache(self.cache, self.max_bytes)

    # -- one file -----------------------------------------------------------------------------------------

    def _name(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _filesystem(self) -> tuple[Any, str]:
        # A file system does not survive a fork, so each process has its own.
        if self._fs is None or self._fs[0] != os.getpid():
            try:
                from fsspec.core import url_to_fs

                fs, root = url_to_fs(self.url, **{**self._http_options(), **self.storage_options})
            except (ImportError, ValueError) as error:
                raise ShardError(
                    f"{self.url}: cannot be opened ({error}); pip install 'comtip-fast[remote]', or download it first",
                    kind="remote",
                ) from error
            self._fs = (os.getpid(), fs, root.rstrip("/"))
        return self._fs[1], self._fs[2]

    def _http_options(self) -> dict[str, Any]:
        """Replace the client's limit of five minutes per file by one per byte."""
        if not _is_http(self.url):
            return {}
        from aiohttp import ClientTimeout

        stall = 2 * self.patience.stall  # only ends what was left already
        return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=stall, sock_read=stall)}}

    def _path(self, name: str) -> tuple[Any, str]:
        fs, root = self._filesystem()
        return fs, f"{root}/{name}" if name else root

    def _version(self, name: str, where: str, deadline: float) -> str:
        """Return a key of what the file is now, from what its server says of it."""
        fs, path = self._path(name)
        info = self._retry(where, deadline, lambda: self._call(lambda: fs.info(path), deadline))
        facts = [
            str(info.get(k)) for k in ("size", "ETag", "etag", "mtime", "LastModified", "updated", "created", "blob_id")
        ]
        return hashlib.sha256("\0".join([where, *facts]).encode()).hexdigest()

    def _download(
        self, name: str, where: str, tmp_path: Path, sha256: str, size: int | None, limit: int, deadline: float
    ) -> None:
        def attempt() -> None:
            digest, n = hashlib.sha256(), 0
            try:
                with tmp_path.open("wb") as file:
                    for chunk in self._chunks(name, deadline):
                        n += len(chunk)
                        if n > (limit if size is None else min(size, limit)):
                            raise _Wrong(f"has more than {n - 1} bytes")
                        digest.update(chunk)
                        file.write(chunk)
            except OSError as error:
                if error.filename == str(tmp_path) or error.errno in _DISK:
                    raise self._files.unwritable(error) from error
                raise
            if (size is not None and n != size) or (sha256 and digest.hexdigest() != sha256):
                raise _Wrong(f"came as {n} bytes that are not those of the manifest")

        self._retry(where, deadline, attempt)

    def _chunks(self, name: str, deadline: float) -> Iterator[bytes]:
        """Yield a file's bytes; a thread reads, so that a server that falls silent is left, not waited for."""
        fs, path = self._path(name)
        # An https server may not know ranges: a stream needs none. Without a size it would be asked for first, which some
        # servers cannot tell; a stream does not use it.
        options = {"block_size": 0, "size": 1} if _is_http(self.url) else {}
        chunks: queue.Queue[bytes | BaseException] = queue.Queue(maxsize=4)
        gone = threading.Event()

        def put(item: bytes | BaseException) -> None:
            while not gone.is_set():
                try:
                    return chunks.put(item, timeout=1)
                except queue.Full:
                    continue

        def pull() -> None:
            try:
                with fs.open(path, "rb", **options) as file:
                    while not gone.is_set():
                        chunk = file.read(_CHUNK)
                        put(chunk)
                        if not chunk:
                            return
            except BaseException as error:  # whatever it is, it is raised where the file is wanted
                put(error)

        threading.Thread(target=pull, daemon=True).start()
        try:
            while True:
                try:
                    item = chunks.get(timeout=max(0.01, min(self.patience.stall, deadline - time.monotonic())))
                except queue.Empty:
                    raise TimeoutError(f"no byte for {self.patience.stall:g} s") from None
                if isinstance(item, BaseException):
                    raise item
                if not item:
                    return
                yield item
        finally:
            gone.set()

    # -- waiting ------------------------------------------------------------------------------------------

    def _call(self, function: Callable[[], T], deadline: float) -> T:
        """Call in a thread, so that a silent server is left."""
        answer: queue.Queue[tuple[bool, Any]] = queue.Queue()

        def call() -> None:
            try:
                answer.put((True, function()))
            except BaseException as error:  # raised where it was asked for
                answer.put((False, error))

        threading.Thread(target=call, daemon=True).start()
        try:
            good, value = answer.get(timeout=max(0.01, min(self.patience.stall, deadline - time.monotonic())))
        except queue.Empty:
            raise TimeoutError(f"no answer for {self.patience.stall:g} s") from None
        if not good:
            raise value
        return value

    def _retry(self, where: str, deadline: float, attempt: Callable[[], T]) -> T:
        for number in range(1, self.patience.attempts + 1):
            try:
                return attempt()
            except ShardError:
                raise
            except ImportError as error:
                raise ShardError(f"{where}: {error}; pip install 'comtip-fast[remote]'", kind="remote") from error
            except Exception as error:  # every protocol has its own kinds
                if isinstance(error, FileNotFoundError) and _is_absent(error):
                    raise ShardError(
                        f"{where}: no such file; is the URL right, and the set whole?", kind="vanished"
                    ) from error
                pause = min(30.0, self.patience.backoff * 2 ** (number - 1))
                late = time.monotonic() + pause >= deadline
                if number == self.patience.attempts or late or not _passing(error):
                    raise self._given_up(where, error, number) from error
                time.sleep(pause)
        raise AssertionError("attempts is at least 1")

    def _given_up(self, where: str, error: Exception, attempts: int) -> ShardError:
        if isinstance(error, _Wrong):
            fix = "the remote copy is damaged or was changed: upload the set again"
            return ShardError(f"{where}: {error}, {attempts} times; {fix}", kind="checksum")
        if isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403):
            fix = "give the credentials that this storage asks for"
        else:
            fix = "check the network and the server, then run again: what was fetched is kept"
        said = str(error) or type(error).__name__
        return ShardError(f"{where}: not fetched after {attempts} attempts ({said}); {fix}", kind="remote")


class _Wrong(Exception):
    """The bytes that came are not the bytes that were asked for."""


_DISK = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG}


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _is_absent(error: FileNotFoundError) -> bool:
    """Tell a file that is not there from a server that did not answer: fsspec says FileNotFoundError of both."""
    cause = error.__cause__
    return cause is None or getattr(cause, "status", None) == 404 or isinstance(cause, FileNotFoundError)


def _passing(error: BaseException) -> bool:
    """Tell whether trying again may help."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)
    return not isinstance(error, (PermissionError, NotImplementedError, TypeError))
