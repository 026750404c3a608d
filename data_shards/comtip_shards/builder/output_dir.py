"""The folder that a shard set is written into: whose it is, who writes, and what a full disk leaves behind."""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comtip_shards.builder.writer import FOLDERS, GENES_FILE
from comtip_shards.errors import ShardError
from comtip_shards.format import spot_table as spots
from comtip_shards.format.manifest import NAME, REPORT_FILE, REPORTS, BuildPart, Manifest, read_manifest
from comtip_shards.storage.atomic import tmp_path_of

STAGING = ".building"
WRITING = ".writing"
"""Ends the names of folders that are not whole yet."""
_OURS = {STAGING, REPORTS, GENES_FILE, REPORT_FILE, spots.FILE, NAME + WRITING, *FOLDERS}
_TEMPORARY = {tmp_path_of(Path(name)).name for name in (NAME, REPORT_FILE, REPORTS)}
_OURS |= _TEMPORARY | {f"{name}.old" for name in _TEMPORARY}


def built_already(out: Path, fingerprint: str, part: BuildPart | None) -> Manifest | None:
    """Return the manifest where ``out`` is this very set, None where it may be written; refuse anything else."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise ShardError(f"{out} is a file; give a folder")
    if (out / NAME).is_file():
        manifest = read_manifest(out)
        if (manifest.fingerprint, manifest.part) != (fingerprint, part):
            raise ShardError(f"{out} holds another shard set; give a new folder or delete this one")
        shutil.rmtree(out / STAGING, ignore_errors=True)  # a build that was killed after its last step
        return manifest
    foreign = sorted(p.name for p in out.iterdir() if p.name not in _OURS)
    if foreign:
        raise ShardError(f"{out} is not empty ({', '.join(foreign[:3])}); give a new folder")
    refuse_links(out)
    return None


def refuse_links(out: Path) -> None:
    """Refuse an unfinished build that holds links: writing would go through them to files elsewhere.

    Raises
    ------
    ShardError
        Naming the first link.
    """
    for path in [p for n in sorted(_OURS) for p in (out / n, *(out / n).rglob("*"))]:
        if path.is_symlink():
            raise ShardError(f"{path}: is a link, which no build writes; delete it, or give a new folder")


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """Hold ``out`` for one writer; gives the staging folder, which is removed when all went well.

    Raises
    ------
    ShardError
        Another process writes there, or the disk is full or does not let us write: what is done is kept.
    """
    staging = out / STAGING
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with (staging / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ShardError(f"{out}: another process is writing here; wait for it, or give a new folder") from None
            for left in staging.glob(f"*{WRITING}"):
                shutil.rmtree(left, ignore_errors=True)  # by a process that was killed
            yield staging
        shutil.rmtree(staging)
    except OSError as error:
        # Sources say for themselves what they cannot read; what is left is ours to write.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise ShardError(
            f"{error.filename or out}: cannot be written ({error.strerror or error}); free space or allow it, then run the "
            "same command again: what is done is kept"
        ) from error
