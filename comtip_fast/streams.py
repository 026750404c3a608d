"""Standard output and standard error of a long run: whoever reads them may leave, the work goes on."""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# The reader of a pipe has ended, a terminal was closed, a log's connection is lost: nothing written later will be read.
_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN)


def write_line(text: str, stream: TextIO | None) -> bool:
    """Write a line and flush it; False, and no error, where the stream does not take it.

    After the reader of the stream has ended, the stream is sent to the null device, so that what other code writes to
    it and Python's own flush at the exit do not fail either. A full disk drops this line only.
    """
    if stream is None:
        return False
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno in _GONE:
            silence(stream)
        return False
    except ValueError:  # closed, or a character that its encoding lacks
        with suppress(OSError, ValueError):
            print(text.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
            return True
        return False
    return True


class Guarded:
    """A stream for everything that people read beside the work (logs, progress bars, warnings): writing never fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is not taken."""
        self._attempt(self._stream.flush)

    def _attempt(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            if error.errno in _GONE:
                silence(self._stream)
        except ValueError:  # closed
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded_stderr() -> Iterator[None]:
    """Let ``sys.stderr`` be guarded while the block runs."""
    plain = sys.stderr
    if plain is None:
        yield
        return
    sys.stderr = Guarded(plain)
    try:
        yield
    finally:
        drain(plain)
        sys.stderr = plain


def silence(stream: TextIO | None) -> None:
    """Send everything that is written to the stream, from any library, to the null device."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())  # type: ignore[union-attr]
        finally:
            os.close(null)
        stream.flush()  # type: ignore[union-attr]


def reader_is_gone(stream: TextIO | None) -> bool:
    """Say whether the stream is a pipe or socket whose other end is closed."""
    try:
        number = stream.fileno()  # type: ignore[union-attr]
        if not (stat.S_ISFIFO(os.fstat(number).st_mode) or stat.S_ISSOCK(os.fstat(number).st_mode)):
            return False
        poll = select.poll()
        poll.register(number, 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def drain(stream: TextIO | None) -> OSError | None:
    """Flush the stream at the end of a command; return why that fails, after which Python's exit does not repeat it."""
    try:
        if stream is not None:
            stream.flush()
    except OSError as error:
        silence(stream)
        return error
    except ValueError:  # closed
        return None
    return None
