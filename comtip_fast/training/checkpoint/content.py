"""Content of a checkpoint in memory, and the hashes of its files."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comtip_shards.storage.regular_file import read_regular

SUMS = "SHA256SUMS"
"""File with one line per file of the checkpoint, in the format of ``sha256sum -c``."""
STATE = "state.json"
MAX_TEXT_BYTES = 1 << 26
"""Maximum size in bytes of the file of hashes and of the state file."""
DELETE = "delete the folder to use an older checkpoint (if there is none, the run starts from step 0)"
MISFIT = f"restore the config and the release of the run, or {DELETE}"
"""Fix for errors about weights that do not fit the model."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another format version or of another run. The message names the folder and the fix."""


def problem_of(error: Exception) -> str:
    """Return the message of a checkpoint's error without the fix :data:`DELETE`, for callers that skip the checkpoint."""
    return str(error).removesuffix(f"; {DELETE}")


@dataclass
class Checkpoint:
    """Everything that is needed to resume a run."""

    model: dict[str, torch.Tensor]
    """State dict of the module."""
    optim: dict[str, torch.Tensor]
    """Optimizer state as tensors named ``<parameter>/<entry>``."""
    state: dict[str, Any]
    """JSON data: step, position in the epoch, best score, random state, config."""
    ema: dict[str, torch.Tensor] = field(default_factory=dict)
    """Averages of the trained weights, by parameter name; empty without ``optim.ema``."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text_file(path: Path) -> bytes:
    """Return the content of the file of hashes or of the state file.

    Raises
    ------
    CheckpointError
        The path is not a regular file, or the file is too large. Other errors of the system are raised unchanged.
    """
    try:
        return read_regular(path, MAX_TEXT_BYTES)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL):
            raise
        raise CheckpointError(f"{path}: {error.strerror}; {DELETE}") from error


def stated_sums(path: Path) -> dict[str, str]:
    """Return ``{file: hash}`` from a file of hashes; raises the same errors as :func:`read_text_file`."""
    lines = read_text_file(path).decode("utf-8", "replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def check_hashes(folder: Path, names: Iterable[str]) -> None:
    """Check files of a checkpoint against its file of hashes.

    Raises
    ------
    CheckpointError
        A file is missing, has no hash in the file of hashes, or does not match its hash.
    """
    sums = folder / SUMS
    if not sums.is_file():
        raise CheckpointError(f"{sums}: {absence(sums)}, the checkpoint is incomplete; {DELETE}")
    stated = stated_sums(sums)
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: {absence(folder / name)}; {DELETE}")
        if name not in stated:
            raise CheckpointError(f"{sums}: no SHA-256 of {name}; {DELETE}")
        if sha256_of(folder / name) != stated[name]:
            raise CheckpointError(f"{folder / name}: the SHA-256 differs from {SUMS}; {DELETE}")


def absence(path: Path) -> str:
    """Return why a path is not a file, as text."""
    if path.exists():
        return "not a regular file"
    return "a link to nothing" if path.is_symlink() else "missing"
