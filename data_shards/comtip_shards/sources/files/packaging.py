"""File names and packaging of downloads: hidden files, gzip, tar archives, and prefixes of file names."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from comtip_shards.errors import SourceError, register_copy

SYSTEM_FILES = {
    "__macosx",
    "icon\r",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "@eadir",
    "#recycle",
}
"""Names, in lower case, of files and folders of macOS, Windows, Linux and file servers."""
MAX_GROWTH = 256
"""Maximum ratio of unpacked to packed bytes for files that unpack to more than :data:`ALWAYS_UNPACKED`."""
ALWAYS_UNPACKED = 1 << 28
"""Unpacked size in bytes up to which any ratio is accepted."""
_GZIP = b"\x1f\x8b"
_BLOCK = 1 << 20


def is_hidden(name: str) -> bool:
    """Return whether a file name belongs to the operating system: dot files, macOS resource forks, Windows caches, locks."""
    return name.startswith((".", "~$")) or name.lower() in SYSTEM_FILES


def find(folder: Path, pattern: str) -> list[Path]:
    """Return the sorted matches of a glob pattern, without hidden files and folders; an empty list if ``folder`` does not exist.

    A pattern that begins with ``*`` is matched case-insensitively.
    """
    if not folder.is_dir():
        return []
    return sorted(
        p for p in folder.glob(_any_case(pattern)) if not any(is_hidden(n) for n in p.relative_to(folder).parts)
    )


def _any_case(pattern: str) -> str:
    """Return a glob pattern that ignores case: Windows, cameras and file servers write ``IMAGE.TIF`` and ``A.H5AD``.

    Patterns that do not begin with ``*`` keep their case, because ``s1`` and ``S1`` may be two sections.
    """
    if not pattern.startswith("*"):
        return pattern
    return re.sub(
        r"\[[^]]*\]|[A-Za-z]", lambda m: f"[{m[0].lower()}{m[0].upper()}]" if len(m[0]) == 1 else m[0], pattern
    )


def contents(folder: Path) -> list[Path]:
    """Return the entries of a folder in sorted order, without hidden files and folders."""
    return find(folder, "*")


def regular_file(path: Path) -> Path:
    """Return the path of an existing regular file, or of a link to one.

    Raises
    ------
    SourceError
        It does not exist, or is a folder, a pipe or a device, which may block forever when read.
    """
    if path.is_file():
        return path
    if path.is_dir():
        raise SourceError(f"{path}: a folder, not a file; give the file itself")
    if path.exists():
        raise SourceError(f"{path}: a pipe or a device, not a file; put a copy of the file there")
    reason = "a link to a file that does not exist" if path.is_symlink() else "no such file"
    raise SourceError(f"{path}: {reason}; copy the file there, or correct the path")


def is_gzip(path: Path) -> bool:
    """Return whether a file is gzip by its first bytes; raises SourceError if it is not a regular file."""
    with regular_file(path).open("rb") as file:
        return file.read(2) == _GZIP


@contextmanager
def open_packed(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; gzip is detected by content and decompressed. Raises SourceError if it is not a regular file."""
    with regular_file(path).open("rb") as raw:
        packed = raw.read(2) == _GZIP
        raw.seek(0)
        if packed:
            with gzip.open(raw) as file:
                yield file  # type: ignore[misc]  # a GzipFile reads like a binary file
        else:
            yield raw


def read_packed(path: Path, limit: int = 1 << 30) -> bytes:
    """Return the content of a file, decompressed if it is gzip.

    Raises
    ------
    SourceError
        It is not a regular file, or the content exceeds ``limit`` bytes or is implausibly larger than the file.
    OSError, EOFError, zlib.error
        The file is damaged gzip, or cannot be read.
    """
    packed, most = is_gzip(path), limit
    size = path.stat().st_size
    if packed:
        most = min(limit, max(ALWAYS_UNPACKED, MAX_GROWTH * size))
    with open_packed(path) as file:
        data = b"" if size > most else file.read(most + 1)
    if len(data) > most or size > most:
        after = " after decompression" if packed else ""
        fix = ", or decompress it (gunzip) if its origin is known" if most < limit else ""
        raise SourceError(f"{path}: more than {most:,} bytes{after}; check that it is the right file{fix}")
    return data


def unpacked(path: Path) -> Path:
    """Return a file that libraries can open: ``path``, or a temporary decompressed copy if it is gzip.

    Copies are deleted when the process ends.

    Raises
    ------
    SourceError
        It is not a regular file, is damaged, or decompresses to implausibly many bytes.
    OSError
        There is no space for the copy.
    """
    if not is_gzip(path):
        return path
    target = _copy_folder(path) / path.name.removesuffix(".gz")
    if not target.is_file():
        tmp_path = target.with_name(f"{target.name}.tmp")
        register_copy(tmp_path, path)
        register_copy(target, path)
        try:
            with gzip.open(path) as source, tmp_path.open("wb") as file:
                _copy(source, file, path)
        except (OSError, EOFError, zlib.error) as error:
            tmp_path.unlink(missing_ok=True)
            _raise_for_disk(error)
            raise SourceError(f"{path}: cannot be decompressed ({error}); copy or download it again") from error
        tmp_path.rename(target)
    return target


def unpacked_tar(path: Path) -> Path:
    """Return a temporary folder with the regular files of a tar archive; it is deleted when the process ends.

    Links, devices, hidden files, and members with absolute paths or ``..`` are skipped.

    Raises
    ------
    SourceError
        The archive is damaged, or unpacks to implausibly many bytes.
    OSError
        There is no space for the files.
    """
    target = _copy_folder(path) / "members"
    if target.is_dir():
        return target
    tmp_path = target.with_name("members.tmp")
    register_copy(tmp_path, path)
    register_copy(target, path)
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    try:
        with tarfile.open(path) as archive:
            total = 0
            for member in archive:
                parts = PurePosixPath(member.name).parts
                unsafe = not parts or parts[0] == "/" or ".." in parts
                if not member.isreg() or unsafe or any(is_hidden(p) for p in parts if p != "."):
                    continue
                total += member.size
                check_growth(total, path)
                inside = tmp_path.joinpath(*(p for p in parts if p != "."))
                inside.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                with inside.open("wb") as file:
                    shutil.copyfileobj(source or io.BytesIO(), file, _BLOCK)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        shutil.rmtree(tmp_path, ignore_errors=True)
        _raise_for_disk(error)
        raise SourceError(f"{path}: cannot be unpacked ({error}); copy or download it again") from error
    tmp_path.rename(target)
    return target


def _copy(source: gzip.GzipFile, file: BinaryIO, path: Path) -> None:
    total = 0
    while block := source.read(_BLOCK):
        total += len(block)
        check_growth(total, path)
        file.write(block)


def _raise_for_disk(error: BaseException) -> None:
    """Raise OSError, with the folder of temporary copies as its file, if the copy failed because of the disk."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(
            error.errno,
            f"{error.strerror} for temporary copies (free space there, or set TMPDIR to another folder)",
            str(temporary_folder()),
        ) from error


def check_growth(total: int, path: Path) -> None:
    """Raise :class:`SourceError` if ``total`` bytes are implausibly many for the content of a packed file."""
    if total > max(ALWAYS_UNPACKED, MAX_GROWTH * path.stat().st_size):
        raise SourceError(
            f"{path}: unpacks to more than {MAX_GROWTH} times its size, so it is probably not data; check the file, "
            "or unpack it first"
        )


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="comtip-unpacked-")


def temporary_folder() -> Path:
    """Return the folder of temporary copies, which is deleted when the process ends."""
    return Path(_temporary().name)


def _copy_folder(path: Path) -> Path:
    state = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = temporary_folder() / key
    folder.mkdir(exist_ok=True)
    return folder


def prefix_of(name: str, role: str) -> str | None:
    """Return the part of a file name before its role ("" if there is none), or None if the name has another role; case is ignored.

    Parameters
    ----------
    name
        A file name, with or without ``.gz``.
    role
        Regular expression for the part of the name that states the content, e.g. ``barcodes[.]tsv``.
    """
    match = re.fullmatch(rf"(?P<prefix>(?:.*[._-])?){role}(?:\.gz)?", name, re.IGNORECASE)
    return None if match is None else match["prefix"]


def by_prefix(folder: Path, role: str) -> dict[str, list[Path]]:
    """Return the files of one role in a folder, grouped by the prefix of their names."""
    out: dict[str, list[Path]] = {}
    for path in contents(folder):
        prefix = prefix_of(path.name, role)
        if prefix is not None and path.is_file():
            out.setdefault(prefix, []).append(path)
    return out
