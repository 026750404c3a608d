"""Access to files at a URL, with a bounded cache, checks of hash and size, timeouts and retries.

Any protocol of fsspec is supported: ``s3://``, ``gs://``, ``https://``, ``hf://datasets/OWNER/NAME``, ``memory://``.
Credentials and other options of a protocol (a key, ``anon``) come from its environment variables, from fsspec's
configuration (``FSSPEC_S3_ANON=true``, ``~/.config/fsspec/conf.json``), or from ``storage_options``.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from comtip_shards.errors import ShardError, install_extra
from comtip_shards.storage.cache import SIZE_VARIABLE, FileCache, default_cache, default_size

T = TypeVar("T")
_CHUNK = 1 << 20
CONCURRENT = 8
"""Requests that one call of :meth:`Remote.read_ranges` has in flight."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
GIB = 2**30


def is_url(path: str | Path) -> bool:
    """Return whether a path is a URL; ``file://`` counts as one."""
    return _URL.match(str(path)) is not None


@dataclass(frozen=True)
class RetryPolicy:
    """Number of attempts and timeouts for a remote; times in seconds."""

    attempts: int = 5
    """Maximum number of attempts for one request."""
    stall: float = 30.0
    """Time without a new byte after which an attempt fails."""
    total: float = 3600.0
    """Time limit for one file over all attempts."""
    backoff: float = 0.5
    """Pause after the first failure; it doubles after each further one, up to 30 s."""


@dataclass
class Remote:
    """A remote folder.

    Parameters
    ----------
    url
        URL of the folder.
    cache
        Cache folder, by default :func:`default_cache`. Processes may share it.
    max_bytes
        Size of the cache, by default :func:`default_size`; least recently used files are evicted first.
    retry
        Retries and timeouts.
    storage_options
        Passed to fsspec's file system.
    """

    url: str
    cache: Path = field(default_factory=default_cache)
    max_bytes: int = field(default_factory=default_size)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    _fs: tuple[int, Any, str] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self.cache = Path(self.cache)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fs": None}

    def fetch(self, name: str, *, sha256: str = "", size: int | None = None, limit: int | None = None) -> Path:
        """Return a local copy of ``url/name``, from the cache if present.

        Parameters
        ----------
        name
            Path below the URL; "" for the URL itself.
        sha256, size
            Expected hash and size in bytes, if known; after a mismatch the file is fetched again, in at most
            ``retry.attempts`` attempts.
        limit
            Maximum size in bytes; a file must also fit into the cache.

        Raises
        ------
        ShardError
            Of kind ``vanished`` (no such file), ``checksum`` (mismatch or too large) or ``remote``; the message names the URL
            and the fix.
        """
        where = self._name(name)
        deadline = time.monotonic() + self.retry.total
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

    def cached(self, sha256: str, name: str, size: int) -> bool:
        """Return whether a file is in the cache with this size in bytes; if so, mark it as used."""
        files = self._files
        return files.has(files.path(sha256, name), size)

    def read_ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return byte ranges of a file, bypassing the cache and without checking a hash; several are requested at a time.

        Parameters
        ----------
        name
            Path below the URL.
        spans
            Offset of the first byte, and of the byte after the last one, of each range.

        Raises
        ------
        ShardError
            Of kind ``vanished`` (no such file), ``checksum`` (fewer bytes than the range received) or ``remote``.
        NoRangesError
            The server ignores ranges and sends whole files.
        """
        deadline, where = time.monotonic() + self.retry.total, self._name(name)
        fs, path = self._path(name)

        def read(span: tuple[int, int]) -> bytes:
            def attempt() -> bytes:
                data: bytes = self._call(lambda: fs.cat_file(path, start=span[0], end=span[1]), deadline)
                if len(data) > span[1] - span[0]:
                    raise NoRangesError(f"{where}: the server ignores byte ranges")
                if len(data) < span[1] - span[0]:
                    raise _MismatchError(f"received {len(data)} bytes of a range of {span[1] - span[0]}")
                return data

            return self._retry(where, deadline, attempt)

        if len(spans) < 2:
            return [read(span) for span in spans]
        with ThreadPoolExecutor(min(CONCURRENT, len(spans)), thread_name_prefix="comtip-ranges") as pool:
            return list(pool.map(read, spans))

    def read(self, name: str, *, limit: int = GIB) -> bytes:
        """Return the current content of a file of at most ``limit`` bytes, bypassing the cache; raises the errors of :meth:`fetch`."""
        deadline = time.monotonic() + self.retry.total
        with self._files.tmp_path() as tmp_path:
            self._download(name, self._name(name), tmp_path, "", None, limit, deadline)
            return tmp_path.read_bytes()

    def names(self, pattern: str = "**") -> list[str]:
        """Return the sorted names of the files below the URL that match a glob pattern; raises ShardError if they cannot be listed."""
        return sorted(self.sizes(pattern))

    def sizes(self, pattern: str = "**") -> dict[str, int | None]:
        """Return {name: size in bytes} of the files of :meth:`names`; a size that the server does not report is None."""
        fs, root = self._filesystem()
        deadline = time.monotonic() + self.retry.total
        glob = f"{root}/{pattern}"
        found = self._retry(
            self._name(pattern), deadline, lambda: self._call(lambda: fs.glob(glob, detail=True), deadline)
        )
        return {
            str(path)[len(root) :].lstrip("/"): None if info.get("size") is None else int(info["size"])
            for path, info in found.items()
            if info.get("type") != "directory"
        }

    def keep(self, key: str, name: str, data: bytes) -> Path:
        """Store bytes in the cache under ``key`` (a SHA-256) and return the file's path; ShardError if it cannot be written."""
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
        """Remove a damaged file from the cache."""
        self._files.forget(sha256)

    @property
    def _files(self) -> FileCache:
        return FileCache(self.cache, self.max_bytes)

    # -- one file -----------------------------------------------------------------------------------------

    def _name(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _filesystem(self) -> tuple[Any, str]:
        # fsspec file systems are not fork-safe, so each process has its own.
        if self._fs is None or self._fs[0] != os.getpid():
            try:
                from fsspec.core import url_to_fs

                fs, root = url_to_fs(self.url, **{**self._http_options(), **self.storage_options})
            except (ImportError, ValueError) as error:
                fix = install_extra("remote") if isinstance(error, ImportError) else "correct the URL"
                text = f"{self.url}: cannot open ({error}); {fix}, or download it first"
                raise ShardError(text, kind="remote") from error
            self._fs = (os.getpid(), fs, root.rstrip("/"))
        return self._fs[1], self._fs[2]

    def _http_options(self) -> dict[str, Any]:
        """Return options that replace the client's total timeout of five minutes by a timeout between bytes."""
        if not _is_http(self.url):
            return {}
        from aiohttp import ClientTimeout

        stall = 2 * self.retry.stall  # only ends connections that were already abandoned
        return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=stall, sock_read=stall)}}

    def _path(self, name: str) -> tuple[Any, str]:
        fs, root = self._filesystem()
        return fs, f"{root}/{name}" if name else root

    def _version(self, name: str, where: str, deadline: float) -> str:
        """Return a cache key for the current version of a file, from the metadata of its server."""
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
                        if n > limit:
                            what, fix = "for this file", "check the URL"
                            if limit == self.max_bytes:
                                what, fix = (
                                    "of the cache",
                                    f"set {SIZE_VARIABLE} to a larger size, or download it first",
                                )
                            text = f"{where}: larger than {limit:,} bytes, the limit {what}; {fix}"
                            raise ShardError(text, kind="checksum")
                        if size is not None and n > size:
                            raise _MismatchError(f"received more than the expected {size:,} bytes")
                        digest.update(chunk)
                        file.write(chunk)
            except OSError as error:
                if error.filename == str(tmp_path) or error.errno in _DISK:
                    raise self._files.unwritable(error) from error
                raise
            if size is not None and n != size:
                raise _MismatchError(f"received {n:,} bytes instead of {size:,}")
            if sha256 and digest.hexdigest() != sha256:
                raise _MismatchError("the received content does not match its SHA-256 in the manifest")

        self._retry(where, deadline, attempt)

    def _chunks(self, name: str, deadline: float) -> Iterator[bytes]:
        """Yield the content of a file; it is read in a thread, so that this process does not block on a hanging server."""
        fs, path = self._path(name)
        # block_size 0 streams, which needs no range requests. A stream does not use the size, but if none is given, fsspec
        # requests it first, which some servers do not support.
        options = {"block_size": 0, "size": 1} if _is_http(self.url) else {}
        chunks: queue.Queue[bytes | BaseException] = queue.Queue(maxsize=4)
        abandoned = threading.Event()

        def put(item: bytes | BaseException) -> None:
            while not abandoned.is_set():
                try:
                    chunks.put(item, timeout=1)
                except queue.Full:
                    continue
                return

        def pull() -> None:
            try:
                with fs.open(path, "rb", **options) as file:
                    while not abandoned.is_set():
                        chunk = file.read(_CHUNK)
                        put(chunk)
                        if not chunk:
                            return
            except BaseException as error:  # raised again in the consumer
                put(error)

        threading.Thread(target=pull, daemon=True).start()
        try:
            while True:
                try:
                    item = chunks.get(timeout=max(0.01, min(self.retry.stall, deadline - time.monotonic())))
                except queue.Empty:
                    raise TimeoutError(f"no data for {self.retry.stall:g} s") from None
                if isinstance(item, BaseException):
                    raise item
                if not item:
                    return
                yield item
        finally:
            abandoned.set()

    # -- waiting ------------------------------------------------------------------------------------------

    def _call(self, function: Callable[[], T], deadline: float) -> T:
        """Return the result of a function called in a thread, or raise TimeoutError if the server does not respond."""
        answer: queue.Queue[tuple[bool, Any]] = queue.Queue()

        def call() -> None:
            try:
                answer.put((True, function()))
            except BaseException as error:  # raised again in the caller
                answer.put((False, error))

        threading.Thread(target=call, daemon=True).start()
        try:
            succeeded, value = answer.get(timeout=max(0.01, min(self.retry.stall, deadline - time.monotonic())))
        except queue.Empty:
            raise TimeoutError(f"no response for {self.retry.stall:g} s") from None
        if not succeeded:
            raise value
        return value

    def _retry(self, where: str, deadline: float, attempt: Callable[[], T]) -> T:
        for number in range(1, self.retry.attempts + 1):
            try:
                return attempt()
            except (ShardError, NoRangesError):
                raise
            except ImportError as error:
                raise ShardError(f"{where}: {error}; {install_extra('remote')}", kind="remote") from error
            except Exception as error:  # every protocol raises its own types
                if isinstance(error, FileNotFoundError) and _is_absent(error):
                    text = f"{where}: no such file; check the URL, and that the files there are complete"
                    raise ShardError(text, kind="vanished") from error
                pause = min(30.0, self.retry.backoff * 2 ** (number - 1))
                late = time.monotonic() + pause >= deadline
                if number == self.retry.attempts or late or not _is_transient(error):
                    raise self._given_up(where, error, number) from error
                time.sleep(pause)
        raise AssertionError("attempts is at least 1")

    def _given_up(self, where: str, error: Exception, attempts: int) -> ShardError:
        if isinstance(error, _MismatchError):
            fix = "the remote copy is damaged or was changed: upload it again, or report it to its owner"
            return ShardError(f"{where}: {error} (attempts: {attempts}); {fix}", kind="checksum")
        if isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403):
            fix = "provide the credentials that this storage requires"
        else:
            fix = "check the network and the server, then run again: fetched files are kept"
        reason = str(error) or type(error).__name__
        return ShardError(f"{where}: not fetched (attempts: {attempts}; {reason}); {fix}", kind="remote")


class NoRangesError(Exception):
    """The server sent a whole file instead of a range."""


class _MismatchError(Exception):
    """The received bytes do not have the expected size or hash; the ShardError that users see adds the URL and the fix."""


_DISK = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG}


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _is_absent(error: FileNotFoundError) -> bool:
    """Return whether the file does not exist; fsspec also raises FileNotFoundError for a server that does not respond."""
    cause = error.__cause__
    return cause is None or getattr(cause, "status", None) == 404 or isinstance(cause, FileNotFoundError)


def _is_transient(error: BaseException) -> bool:
    """Return whether a retry may succeed."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)
    return not isinstance(error, (PermissionError, NotImplementedError, TypeError))
