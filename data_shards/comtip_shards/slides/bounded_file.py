"""A file object that limits how much an image library reads.

Pillow searches some headers byte by byte (JPEG, GIF), and reads others as one block whose length the file states (TIFF tags,
chunks of PNG, WebP). In a file that ends in a hole of 1 TB, or that states such a length, this takes hours or all memory.
"""

from __future__ import annotations

import io
from pathlib import Path

from comtip_shards.errors import SourceError

HEADER_BYTES = 512 << 20
"""Bytes that may be read before the size of the image is known; a lossless WebP image, which is read at once, has at most 400 MB."""
BYTES_PER_PX = 8
"""Further bytes per pixel that may be read: four channels of 16 bits without compression."""
MAX_READS = 1_000_000
"""Maximum number of reads; a TIFF of 10,000 pages takes 400,000, and a search byte by byte takes one for each byte."""


class BoundedFile(io.BufferedReader):
    """A file opened for reading, with a limit on the number of reads and of bytes read.

    Parameters
    ----------
    path
        A regular file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._path, self._end = path, path.stat().st_size
        self._left_bytes, self._left_reads = HEADER_BYTES, MAX_READS

    def allow(self, size: tuple[int, int]) -> None:
        """Raise the limit on bytes by what the pixels of an image of ``size``, (width, height), may take."""
        self._left_bytes += BYTES_PER_PX * size[0] * size[1]

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to ``size`` bytes, or to the end of the file.

        Raises
        ------
        SourceError
            A limit is exceeded; the message names the file and its size.
        """
        if size is None or size < 0:
            size = max(0, self._end - self.tell())
        self._left_bytes -= size
        self._left_reads -= 1
        if min(self._left_bytes, self._left_reads) < 0:
            raise SourceError(
                f"{self._path}: the image has no end, or its header states a block of {size:,} bytes, in a file of {self._end:,} "
                "bytes; the file is damaged: copy or download it again"
            )
        return super().read(size)
