"""Cache folder of fetched files, bounded in size and shared by processes."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from comtip_shards.errors import ShardError
from comtip_shards.names import FOREIGN, is_sha256, problem_with, shown
from comtip_shards.storage.atomic import publish
from comtip_shards.storage.disk import disk_fix, disk_trouble

CACHE_VARIABLE, SIZE_VARIABLE = "COMTIP_CACHE", "COMTIP_CACHE_GB"
SLACK = 64
"""A process lists the folder after it has added ``max_bytes / SLACK`` bytes, and eviction frees this much more than necessary. P
processes may therefore exceed ``max_bytes`` by (P - 1) / 64 of it."""
_unlisted: dict[str, int] = {}
"""Bytes that this process has added to a folder since it was listed last."""
_tmp_paths: dict[Path, int] = {}
"""Temporary files of fetches in progress, and the processes that write them: a forked process inherits those of its parent."""
_DAY = 24 * 3600
NETWORKED = (
    *("nfs", "nfs3", "nfs4", "cifs", "smb3", "smbfs", "afs", "fuse.sshfs", "fuse.s3fs"),
    *("lustre", "gpfs", "beegfs", "ceph", "panfs", "wekafs", "pvfs2", "orangefs"),
)
"""File systems accessed over a network, on which a cache has no benefit."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of ``flock`` on network file systems mounted without lock support."""


def default_cache() -> Path:
    """Return the cache folder: ``$COMTIP_CACHE`` if it is set, otherwise ``comtip`` in the user's cache folder.

    If the latter is on a network file system, ``comtip-UID`` in the folder for temporary files is created and returned instead.

    Raises
    ------
    ShardError
        The folder ``comtip-UID`` belongs to another user, or is a symbolic link.
    """
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comtip"
    if file_system_of(home) not in NETWORKED:
        return home
    # Home folders of clusters are on a file server, which would store what every node reads.
    local = Path(tempfile.gettempdir()) / f"comtip-{os.getuid()}"
    local.mkdir(mode=0o700, exist_ok=True)
    if local.is_symlink() or local.stat().st_uid != os.getuid():
        problem = "is a symbolic link" if local.is_symlink() else "belongs to another user"
        raise ShardError(f"{local}: {problem}; set {CACHE_VARIABLE} to your own folder", kind="remote")
    return local


def file_system_of(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the type of the file system of a path, such as ``ext4`` or ``nfs4``, from the table ``mounts``; "" if unknown."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    target, best, found = str(path.absolute()), "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        point = fields[4].replace("\\040", " ").rstrip("/")
        if (target == point or target.startswith(f"{point}/")) and len(point) >= len(best):
            best, found = point, after.split()[0]
    return found


def default_size() -> int:
    """Return ``$COMTIP_CACHE_GB`` in bytes, 50 GB if it is not set; raises ShardError if it is not a positive number."""
    text = os.environ.get(SIZE_VARIABLE, "50")
    try:
        size = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ShardError(
            f"{SIZE_VARIABLE}={text}: not a positive number; give the size in gigabytes, or unset it", kind="remote"
        )
    return size


class FileCache:
    """Cache of files by SHA-256 key with least-recently-used eviction, shared by processes.

    Its methods raise :class:`ShardError` for a key that is no SHA-256, and if the folder cannot be written.

    Parameters
    ----------
    folder
        The folder; it is created on first use.
    max_bytes
        Maximum total size of the files, which several processes may exceed slightly (:data:`SLACK`).
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def path(self, key: str, name: str) -> Path:
        """Return the path for a key; the file is named after the last component of ``name`` if that is a valid file name."""
        last = name.rsplit("/", 1)[-1].split("?", 1)[0]
        return self._of(key) / (last if not problem_with(last) else "file")

    def _of(self, key: str) -> Path:
        """Return the folder of a key; raises ShardError if it is not a SHA-256, because it may come from a manifest."""
        if not is_sha256(key):
            raise ShardError(f"{shown(key)} is not a SHA-256 and cannot be a cache key; {FOREIGN}", kind="manifest")
        return self.folder / key[:2] / key

    def has(self, path: Path, size: int | None) -> bool:
        """Return whether a file is cached, with ``size`` bytes unless that is None; if so, mark it as used now."""
        try:
            if size is not None and path.stat().st_size != size:
                return False
            os.utime(path)
        except OSError:
            return False
        return True

    @contextmanager
    def tmp_path(self) -> Iterator[Path]:
        """Yield a temporary path, which is removed at the end unless :meth:`put` has moved it into the cache.

        Its name is random, unlike in :mod:`comtip_shards.storage.atomic`, because several processes may fetch one file.
        """
        path = self.folder / "fetching" / uuid.uuid4().hex
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.unwritable(error) from error
        _tmp_paths[path] = os.getpid()
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
            del _tmp_paths[path]

    def put(self, tmp_path: Path, path: Path) -> None:
        """Move a complete file into the cache, and evict old files if it is full."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            publish(tmp_path, path)  # flushed, because cached files are not hashed again
        except OSError as error:
            raise self.unwritable(error) from error
        self._make_room(path.stat().st_size, path)

    def forget(self, key: str) -> None:
        """Remove the files of a key."""
        shutil.rmtree(self._of(key), ignore_errors=True)

    def unwritable(self, error: OSError) -> ShardError:
        """Return the exception for a cache folder that cannot be written."""
        fix = disk_fix(error) if disk_trouble(error) is not None else "make the folder writable"
        return ShardError(
            f"{self.folder}: cannot write to the cache ({error.strerror}); {fix}, or use another folder (`cache`, or {CACHE_VARIABLE})",
            kind="remote",
        )

    @contextmanager
    def locked(self, key: str, where: str, deadline: float) -> Iterator[None]:
        """Hold the lock of a key during a fetch, waiting for other processes until ``deadline`` (monotonic seconds).

        Raises
        ------
        ShardError
            Another process still holds the lock at ``deadline``, or the cache cannot be written; ``where`` names the file.
        """
        folder = self.folder / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / self._of(key).name).open("w")
        except OSError as error:
            raise self.unwritable(error) from error
        with file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno in NO_LOCKS:
                        break  # without locks, two processes may fetch the same file; each moves a complete copy
                    if not isinstance(error, BlockingIOError):
                        raise self.unwritable(error) from error
                    if time.monotonic() > deadline:
                        raise ShardError(
                            f"{where}: another process did not fetch it in time; check the network, then run again",
                            kind="remote",
                        ) from None
                    time.sleep(0.05)
            yield

    def _make_room(self, added: int, keep: Path) -> None:
        """Evict files at the first call and after every ``max_bytes / SLACK`` added bytes: the cost per file is constant."""
        folder = str(self.folder)
        unlisted = _unlisted.get(folder, self.max_bytes) + added
        _unlisted[folder] = 0 if unlisted > self.max_bytes // SLACK else unlisted
        if not _unlisted[folder]:
            self._evict(keep)

    def _evict(self, keep: Path) -> None:
        """Remove least recently used files, except ``keep``, until the limit is met.

        Leftovers of killed processes are removed too. Open files stay readable.
        """
        files = []
        for path in self.folder.glob("??/*/*"):
            try:
                stat = path.stat()
            except OSError:
                continue  # removed by another process
            files.append((stat.st_mtime_ns, stat.st_size, path))
        excess = sum(size for _, size, _ in files) - self.max_bytes
        if excess > 0:
            excess += self.max_bytes // SLACK
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            if path != keep:
                shutil.rmtree(path.parent, ignore_errors=True)
                excess -= size
        for path in (self.folder / "fetching").glob("*"):
            try:
                if time.time() - path.stat().st_mtime > _DAY:
                    path.unlink()  # left by a killed process
            except OSError:
                continue


def remove_tmp_files() -> None:
    """Remove the partial files of this process's fetches; for a process that ends without waiting for them."""
    for path, pid in list(_tmp_paths.items()):
        if pid == os.getpid():
            with suppress(OSError):
                path.unlink()
