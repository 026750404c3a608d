"""Atomic writes: after a crash, a file or folder has its former or its new content, never a part of it.

A folder that is replaced is missing between two renames; after a crash between them, its old content is in ``.NAME.writing.old``.

Data is written to a temporary path next to the target, flushed to the device and renamed. The temporary path of a target
is always the same, so that leftovers of a killed process are overwritten and do not accumulate. Writers that need another
temporary path, such as the cache, call :func:`publish` directly.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from comtip_shards.errors import ShardError, SourceError
from comtip_shards.storage.disk import error_number

_SUFFIX = ".writing"
_NAME_BYTES = 255
# Error numbers of file systems that cannot flush a folder, or cannot flush at all.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
_NO_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def tmp_path_of(target: Path) -> Path:
    """Return the temporary path of a target: ``.NAME.writing`` in the same folder, hashed if the name is too long."""
    name = f".{target.name}{_SUFFIX}"
    if len(os.fsencode(name)) > _NAME_BYTES:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]}{_SUFFIX}"
    return target.with_name(name)


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield the temporary path of a file; it is renamed to ``target`` when the block ends without an error.

    ``target`` keeps its content until then, even if the disk is full, and keeps its permissions. Symbolic links are
    followed.

    Raises
    ------
    FileExistsError
        Another process is writing the same target.
    ValueError
        ``target`` is not a regular file but a folder, device or pipe.
    OSError
        The write failed; the message names the target or its temporary path.
    """
    target = Path(os.path.realpath(target))
    mode = _mode_of(target)
    tmp_path = tmp_path_of(target)
    with _named(target):
        descriptor = _locked(tmp_path, target)
        try:
            created = os.fstat(descriptor).st_mode & 0o777 if mode is None else mode
            yield tmp_path
            os.chmod(tmp_path, created)  # noqa: PTH101  safetensors creates files with mode 0600
            publish(tmp_path, target)
        except BaseException:
            with suppress(OSError):
                tmp_path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def write_atomic(target: Path | str, content: str | bytes) -> None:
    """Write a file from memory; raises the errors of :func:`atomic_path`."""
    with atomic_path(target) as tmp_path:
        tmp_path.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(target: Path, tmp_path: Path | None = None, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yield the temporary path at which the block must create a folder; it is renamed to ``target`` if the block raises no error.

    An existing folder at ``target`` is kept until the new one is complete, and deleted after it was replaced.

    Parameters
    ----------
    target
        The folder; its parent must exist.
    tmp_path
        Temporary path on the same file system; None uses :func:`tmp_path_of`.
    keep_existing
        If another process has created ``target`` in the meantime, keep its folder and delete this one.

    Raises
    ------
    OSError
        The write failed; the message names the target or a path in its temporary folder.
    """
    tmp_path = tmp_path or tmp_path_of(target)
    shutil.rmtree(tmp_path, ignore_errors=True)
    old = tmp_path.with_name(f"{tmp_path.name}.old")
    with _named(target):
        try:
            yield tmp_path
            _open_up(tmp_path)
            if keep_existing:
                _publish_or_keep(tmp_path, target)
            else:
                _publish_over(tmp_path, target, old)
        except BaseException:
            shutil.rmtree(tmp_path, ignore_errors=True)
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def publish(tmp_path: Path, target: Path) -> None:
    """Flush a complete file or folder to the device and rename it to ``target``, which is replaced if it is a file or an empty folder."""
    flush_tree(tmp_path)
    _rename(tmp_path, target)


def _rename(tmp_path: Path, target: Path) -> None:
    tmp_path.rename(target)
    flush(target.parent)


def publish_link(source: Path, target: Path) -> None:
    """Replace ``target`` atomically by a hard link to a complete file, or by a copy if a hard link cannot be created."""
    tmp_path = target.with_name(f"{target.name}.{os.getpid()}{_SUFFIX}")
    tmp_path.unlink(missing_ok=True)
    link_or_copy(source, tmp_path)
    publish(tmp_path, target)


def link_or_copy(source: Path, target: Path) -> None:
    """Create ``target`` as a hard link to ``source``, or as a copy if a hard link cannot be created."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _publish_or_keep(tmp_path: Path, target: Path) -> None:
    try:
        publish(tmp_path, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(tmp_path)


def _publish_over(tmp_path: Path, target: Path, old: Path) -> None:
    flush_tree(tmp_path)  # before the target is moved, so that it is missing only between two renames
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    _rename(tmp_path, target)


def flush(path: Path) -> None:
    """Write a file or folder from the caches of the system to the device (fsync), if its file system supports that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Write a file, or a folder and all files and folders below it, from the caches of the system to the device (fsync)."""
    for path in folder.rglob("*") if folder.is_dir() else ():
        flush(path)
    flush(folder)


def refuse_input_as_output(out: Path, inputs: Iterable[Path | str], option: str = "`out`") -> None:
    """Refuse an existing output that is one of the inputs or lies in one, directly or through links.

    Parameters
    ----------
    out
        The path that will be written.
    inputs
        Paths that are read; missing ones are ignored.
    option
        Name of the argument for ``out``, for the message.

    Raises
    ------
    ValueError
        The output is an input; the message names both paths.
    """
    for item in map(Path, inputs):
        if not item.exists():
            continue
        same = out.exists() and (out.samefile(item) or (item.is_dir() and _holds(item, out)))
        if same:
            raise ValueError(f"{option} {out} is the input {item} itself (or a file in it); give another {option}")


def _holds(folder: Path, out: Path) -> bool:
    """Return whether an existing path is inside a folder, also through a symbolic or hard link."""
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        return True
    stat = out.stat()
    if out.is_dir() or stat.st_nlink == 1:
        return False
    return any(p.is_file() and p.samefile(out) for p in folder.rglob("*"))


def _mode_of(target: Path) -> int | None:
    """Return the permissions of a regular file, None if it does not exist; raises ValueError for other types."""
    if not target.exists():
        return None
    if not target.is_file():
        raise ValueError(f"{target} is not a regular file; give the name of a file to write")
    return target.stat().st_mode & 0o777


def _locked(tmp_path: Path, target: Path) -> int:
    """Create the temporary file, locked if the file system has locks; the kernel releases the lock when the process ends."""
    while True:
        descriptor = os.open(tmp_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCK:
                os.close(descriptor)
                if isinstance(error, BlockingIOError):
                    raise FileExistsError(
                        f"{target}: another process is writing it; wait for it, or give another name"
                    ) from None
                raise
        # The previous holder may have renamed the file between open and lock; then it is the target by now.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.lstat(tmp_path)):
                os.ftruncate(descriptor, 0)
                return descriptor
        os.close(descriptor)


def _open_up(folder: Path) -> None:
    """Give every file in a folder the permissions of a new file, because safetensors creates files with mode 0600."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


@contextmanager
def _named(target: Path) -> Iterator[None]:
    """Convert library errors with an error number but no file name into an OSError that names the target."""
    try:
        yield
    except (SourceError, ShardError):
        raise
    except Exception as error:
        number = error_number(error)
        if number is None or (isinstance(error, OSError) and error.filename):
            raise
        raise OSError(number, os.strerror(number), str(target)) from error
