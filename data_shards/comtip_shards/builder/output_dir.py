"""Output directory of a shard set: ownership, locking and cleanup."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from comtip_shards.builder.skipping import INCOMPLETE
from comtip_shards.builder.writer import FOLDERS
from comtip_shards.errors import ShardError
from comtip_shards.format import spot_table as spots
from comtip_shards.format.manifest import (
    GENES_FILE,
    NAME,
    REPORT_FILE,
    REPORTS,
    BuildPart,
    Manifest,
    files_of,
    read_manifest,
)
from comtip_shards.format.statistics import FILE as STATISTICS_FILE
from comtip_shards.names import inside
from comtip_shards.storage.atomic import tmp_path_of
from comtip_shards.storage.cache import NO_LOCKS
from comtip_shards.storage.disk import disk_fix, disk_trouble
from comtip_shards.storage.regular_file import read_regular

STAGING = ".building"
WRITING = ".writing"
"""Suffix of folders that are not complete yet."""
REMOVING = ".building.removing"
"""Name of the staging folder during deletion: it is renamed first, so that a build that starts then gets a new folder."""
_ATTEMPTS = 100
"""Attempts to remove a folder that another process removes too."""
_OURS = {STAGING, REMOVING, REPORTS, GENES_FILE, REPORT_FILE, spots.FILE, STATISTICS_FILE, NAME + WRITING, *FOLDERS}
_TEMPORARY = {tmp_path_of(Path(name)).name for name in (NAME, REPORT_FILE, REPORTS, STATISTICS_FILE)}
_OURS |= _TEMPORARY | {f"{name}.old" for name in _TEMPORARY}


def built_already(
    out: Path, fingerprint: str, part: BuildPart | None, replaceable: str | None = None
) -> Manifest | None:
    """Return the manifest if ``out`` already holds this set completely, None if ``out`` may be written.

    Call it before :func:`writing`, so that a finished set may be read-only, and again inside that block, because another
    process may have finished the set in between. ``replaceable`` is the fingerprint of a set that was written without some
    of its sections and may be replaced by the complete one.

    Raises
    ------
    ShardError
        ``out`` holds anything else.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise ShardError(f"{out} is a file; give a folder")
    if (out / NAME).is_file():
        manifest = read_manifest(out)
        if (manifest.fingerprint, manifest.part) != (fingerprint, part):
            if replaceable is not None and manifest.fingerprint == replaceable:
                return None
            raise ShardError(f"{out} holds another shard set; give a new folder or delete this one")
        if is_complete(out, manifest):
            return manifest
    foreign = sorted(p.name for p in out.iterdir() if p.name not in {NAME, *_OURS})
    if foreign:
        raise ShardError(f"{out} is not empty ({', '.join(foreign[:3])}); give a new folder")
    refuse_links(out)
    return None


def is_complete(out: Path, manifest: Manifest) -> bool:
    """Return whether every file whose hash is in the manifest is intact: tars by their size, other files by their hash."""
    tars = {s.file: s.bytes for s in manifest.shards}
    try:
        for name, digest in files_of(manifest).items():
            path = inside(out, name)
            if name in tars:
                if not path.is_file() or path.stat().st_size != tars[name]:
                    return False
            elif hashlib.sha256(read_regular(path)).hexdigest() != digest:
                return False
    except OSError:
        return False
    return True


def clear_staging(out: Path) -> None:
    """Remove the staging folder that a finished set may still have; it is kept if it is in use or cannot be removed."""
    if (out / STAGING).is_dir() or (out / REMOVING).is_dir():
        with suppress(ShardError), writing(out) as staging:
            (staging / INCOMPLETE).unlink(missing_ok=True)


def refuse_links(out: Path) -> None:
    """Check that an unfinished build has no symbolic links, through which files elsewhere would be written.

    Raises
    ------
    ShardError
        There is a symbolic link; the message names the first one.
    """
    for path in [p for n in sorted(_OURS) for p in (out / n, *(out / n).rglob("*"))]:
        if path.is_symlink():
            raise ShardError(f"{path}: is a symbolic link, which no build writes; delete it, or give a new folder")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock file in the staging folder."""
    lock = _lock(out)
    try:
        yield
    finally:
        os.close(lock)


def _lock(out: Path) -> int:
    path = out / STAGING / "lock"
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except (FileExistsError, FileNotFoundError):
            if (out / STAGING).is_file():
                raise ShardError(f"{out / STAGING} is a file; delete it, or give a new folder") from None
            continue  # the holder removed the folder in between
        try:
            lock_or_warn(lock, out)
            # The holder may have removed the folder after this process opened the file; then the lock has no effect.
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(lock)
            raise ShardError(f"{out}: another process is writing here; wait for it, or give a new folder") from None
        os.close(lock)


def lock_or_warn(file: int, folder: Path) -> None:
    """Lock a file exclusively; on a file system without locks, print a warning and continue.

    Raises
    ------
    BlockingIOError
        Another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"comtip: warning: {folder}: this file system has no locks ({error.strerror}); make sure that only one process "
            "writes here",
            file=sys.stderr,
        )


def _remove_staging(out: Path) -> None:
    """Rename the staging folder to :data:`REMOVING` and remove it.

    The next process may start as soon as the folder is renamed, so both may remove :data:`REMOVING` at the same time.
    """
    removing, last = out / REMOVING, _ATTEMPTS - 1
    for attempt in range(_ATTEMPTS):
        shutil.rmtree(removing, ignore_errors=True)
        try:
            (out / STAGING).rename(removing)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == last:
                raise
    for attempt in range(_ATTEMPTS):
        try:
            shutil.rmtree(removing)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or attempt == last:
                raise
        if not removing.exists():
            return


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """Lock ``out`` and yield its staging folder, which is removed when the block ends without an error.

    The staging folder is kept if the block leaves :data:`comtip_shards.builder.skipping.INCOMPLETE` in it.

    Raises
    ------
    ShardError
        Another process writes there, the disk is full, writing is not permitted, a folder is where a file must be, or the
        staging folder is a file; staged sections are kept.
    """
    staging = out / STAGING
    try:
        with _locked(out):
            for left in staging.glob(f"*{WRITING}"):
                shutil.rmtree(left, ignore_errors=True)  # left by a killed process
            yield staging
            if (staging / INCOMPLETE).is_file():
                return  # sections were left out: the others stay staged for the run that completes the set
            _remove_staging(out)
    except OSError as error:
        # Sources raise SourceError for files that they cannot read, so these errors are from writing.
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EROFS,
            errno.EACCES,
            errno.EPERM,
            errno.EISDIR,
        ):
            raise
        raise ShardError(
            f"{error.filename or out}: cannot be written ({error.strerror or error}); {_fix_of(error)}, then run the same "
            "command again: staged sections are kept"
        ) from error


def _fix_of(error: OSError) -> str:
    """Return the fix for a write error, as a clause of the message."""
    if disk_trouble(error) is not None:
        return disk_fix(error)
    return "delete this folder" if error.errno == errno.EISDIR else "make the folder writable"
