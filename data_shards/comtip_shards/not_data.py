"""Detection of archives and of files that are not data (Git LFS pointers, web pages, empty files), by their first bytes."""

from __future__ import annotations

from pathlib import Path

from comtip_shards.errors import SourceError

HEAD_BYTES = 4096
OME_TIFF = "OME-TIFF (QuPath, or bfconvert -pyramid-resolutions 5)"
"""The format to convert images to that no reader knows, and how."""
_SIGNATURES = (
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"\x1f\x8b", "a gzip file; decompress it first (gunzip)"),
    (b"BZh", "a bzip2 file; decompress it first (bunzip2; a .tar.bz2: tar -xf)"),
    (b"\xfd7zXZ\0", "an xz file; decompress it first (unxz; a .tar.xz: tar -xf)"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; decompress it first (unzstd)"),
    (b"Rar!", "a rar archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"RDX", "an R file; write the object as .h5ad (zellkonverter::writeH5AD)"),
    (b"%PDF", "a PDF document, not data; give the data file"),
)
_ERROR_TEXTS = (
    b"404: not found",
    b"404 not found",
    b"not found",
    b"entry not found",
    b"repository not found",
    b"429: too many requests",
    b"invalid username or password",
    b"invalid credentials",
    b"access denied",
    b"unauthorized",
    b"forbidden",
    b"access to dataset ",
    b"access to model ",
    b'{"error"',
    b'{"message"',
    b'{"detail"',
)
"""First words of short answers that servers send instead of a file (GitHub, Hugging Face, S3), in lower case."""
SHORT_BYTES = 1024
"""Maximum size of such an answer."""
_ERROR_PAGES = (b"<error", b"accessdenied", b"nosuchkey", b"<message>")


def is_zarr_folder(path: Path) -> bool:
    """Return whether a folder is a zarr, as OME-Zarr images are."""
    return any((path / name).is_file() for name in (".zattrs", ".zgroup", "zarr.json"))


def text_encoding(start: bytes) -> str:
    """Return a text's encoding: UTF-16 if it starts with the byte order mark of UTF-16 (Excel's "Unicode text"), else UTF-8."""
    return "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def not_data(path: Path) -> str | None:
    """Return what a file is and what to do if it is a pipe or a device or its first bytes are not data; otherwise None."""
    if path.exists() and not path.is_file():  # opening a pipe waits for a writer
        return None if path.is_dir() else "this is a pipe or a device, not a file; copy its content to a regular file"
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "the file is empty (0 bytes); download or copy it again"
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file itself; run git lfs pull, or download the file again"
    if text.startswith(b"/annex/objects/") or b"/.git/annex/" in text[:256]:
        return "this is a git-annex pointer, not the file itself; run git annex get"
    if text.startswith((b"<!doctype html", b"<html", b"<head")) or (text.startswith(b"<!--") and b"<html" in text):
        return "this is a web page, not the file itself; the download failed or needs a login, so download it again"
    if text.startswith((b"<?xml", b"<error")) and any(word in text for word in _ERROR_PAGES):
        return "this is an error message of a server, not the file itself; download it again"
    if len(head) <= SHORT_BYTES and text.startswith(_ERROR_TEXTS):
        return (
            f"this is an error message of a server ({' '.join(text[:60].decode('ascii', 'replace').split())}), not the file itself; check the "
            "address and the access rights, and download it again"
        )
    if head.count(0) == len(head):
        return "the file begins with zero bytes only, as after an interrupted download; download or copy it again"
    return None


def archive_kind(path: Path) -> str | None:
    """Return what a file is and what to do, if it is an archive, a gzip file, a PDF or an R file; otherwise None."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return None
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first (tar -xf)"
    if head.startswith(b"\x1f\x8b") and path.name.lower().endswith((".tar.gz", ".tgz")):
        return "a tar archive; unpack it first (tar -xf)"
    return next((text for magic, text in _SIGNATURES if head.startswith(magic)), None)


def refuse_not_data(path: Path) -> Path:
    """Return ``path`` after checking with :func:`not_data` that the file holds data.

    Raises
    ------
    SourceError
        The file holds no data; the message states the file, what it is, and the fix.
    """
    reason = not_data(path)
    if reason is not None:
        raise SourceError(f"{path}: {reason}")
    return path
