"""Check of the size of a text table before it is read into memory."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from comtip_shards.errors import SourceError
from comtip_shards.sources.files.packaging import ALWAYS_UNPACKED, MAX_GROWTH, is_gzip

MAX_TABLE_BYTES, MAX_COUNTS_BYTES = 1 << 30, 1 << 33
"""Maximum size of a table of spots or sections, and of a count matrix as text, after decompression."""
MAX_LINE = 1 << 26
"""Maximum length in bytes of a line, such as a header with all genes; in a file with a hole, a line has no end."""
_BLOCK = 1 << 22


def check_table_size(path: Path, limit: int) -> int:
    """Return the size of a text file in bytes, after decompression if it is gzip.

    Parameters
    ----------
    path
        An existing regular file.
    limit
        Maximum size in bytes.

    Raises
    ------
    SourceError
        The file is larger than ``limit``, grows as a decompression bomb does, or cannot be decompressed.
    """
    size = path.stat().st_size
    if size > limit:
        raise SourceError(
            f"{path}: {size:,} bytes are too many for this table (at most {limit:,}); check that it is the right file"
        )
    if not is_gzip(path):
        return size
    allowed, total = min(limit, max(ALWAYS_UNPACKED, MAX_GROWTH * size)), 0
    try:
        with gzip.open(path) as file:
            while block := file.read(_BLOCK):
                total += len(block)
                if total > allowed:
                    fix = (
                        "the maximum for this table; check that it is the right file"
                        if allowed == limit
                        else "so this may be a decompression bomb; check the file, or decompress it (gunzip) if its origin is known"
                    )
                    raise SourceError(f"{path}: {size:,} bytes decompress to more than {allowed:,}, {fix}")
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: cannot be read as gzip ({error}); copy or download it again") from error
    return total
