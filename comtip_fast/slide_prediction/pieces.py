"""Pieces of an unfinished prediction on disk, from which the next process resumes."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from comtip_shards.storage.atomic import write_atomic

PLAN = "plan.json"
CACHED_BYTES = 64 << 20
"""Size of the cache of pieces of features."""


def digest(plan: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON-serialisable plan, in hexadecimal."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


class Pieces:
    """Folder of pieces next to an output; a context manager, which holds a lock on the folder if the file system has locks.

    Parameters
    ----------
    out
        The output.
    plan
        Everything that the pieces depend on. Pieces of another plan are deleted.

    Raises
    ------
    FileExistsError
        On entering the context: another process holds the lock, or the folder is a file or contains other files.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any]) -> None:
        self.folder, self.plan = out.with_name(f".{out.name}.parts"), digest(plan)
        self.discarded = False
        """Whether pieces of another plan were deleted."""

    def __enter__(self) -> Pieces:
        if self.folder.is_file():
            raise FileExistsError(
                f"{self.folder}: a file, but a folder for unfinished pieces is needed; move or delete it"
            )
        self.folder.mkdir(exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise FileExistsError(
                f"{self.folder}: in use by another process that writes the same output; wait for it, or choose another output file"
            ) from None
        except OSError:
            pass  # a file system without locks
        plan = self.folder / PLAN
        if not plan.is_file() or plan.read_text() != self.plan:
            self._clear(known=plan.is_file())
            write_atomic(plan, self.plan)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def _clear(self, *, known: bool) -> None:
        """Empty the folder; raise FileExistsError if it contains files and is not known to be a folder of pieces."""
        others = [p for p in self.folder.iterdir() if p.name != PLAN and not p.name.startswith(".")]
        if others and not known:
            raise FileExistsError(
                f"{self.folder}: contains files that do not belong to a prediction; move or delete the folder"
            )
        for path in self.folder.iterdir():
            path.unlink()
        self.discarded = bool(others)

    def has(self, name: str) -> bool:
        """Return whether a piece has been written; a written piece is complete."""
        return (self.folder / f"{name}.npy").is_file()

    def write(self, name: str, values: np.ndarray) -> None:
        """Write a piece atomically."""
        buffer = io.BytesIO()
        np.save(buffer, values, allow_pickle=False)
        write_atomic(self.folder / f"{name}.npy", buffer.getvalue())

    def read(self, name: str) -> np.ndarray:
        """Return the values of a piece."""
        values: np.ndarray = np.load(self.folder / f"{name}.npy", allow_pickle=False)
        return values

    def remove(self) -> None:
        """Delete the folder, once the output is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


class PieceFeatures:
    """Features of all tiles, read from pieces of ``size`` tiles each; recently used pieces are cached."""

    def __init__(self, pieces: Pieces, size: int, width: int) -> None:
        self._pieces, self._size, self._width = pieces, size, width
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._keep = max(2, CACHED_BYTES // (4 * width * size))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the features of the tiles ``rows`` (int64, ascending), float32 (n, W)."""
        out = np.empty((rows.size, self._width), np.float32)
        number = rows // self._size
        for piece in np.unique(number).tolist():
            mine = number == piece
            out[mine] = self._piece(piece)[rows[mine] - piece * self._size]
        return out

    def _piece(self, piece: int) -> np.ndarray:
        """Return one piece of features, from the cache if it is there."""
        if piece not in self._cache:
            self._cache[piece] = self._pieces.read(feature_name(piece))
            while len(self._cache) > self._keep:
                self._cache.popitem(last=False)
        self._cache.move_to_end(piece)
        return self._cache[piece]


def feature_name(piece: int) -> str:
    """Return the name of a piece of features."""
    return f"features-{piece:06d}"


def value_name(piece: int) -> str:
    """Return the name of a piece of predictions."""
    return f"values-{piece:06d}"
