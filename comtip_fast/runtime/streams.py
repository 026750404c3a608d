"""Writing to standard output and standard error without errors after their reader has closed them."""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN)
"""Errors of a pipe, terminal or connection whose reader has closed it; later writes would fail too."""


def write_line(text: str, stream: TextIO | None) -> bool:
    """Write a line and flush it; return whether it was written, instead of raising an error.

    If the encoding of the stream lacks a character, all characters outside ASCII are written as escape sequences. If the reader has
    closed the stream, the stream is redirected to the null device, so that later writes and Python's flush at exit do not fail
    either. If the disk is full, only this line is lost.
    """
    if stream is None:
        return False
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno in _GONE:
            silence(stream)
        return False
    except ValueError:  # the stream is closed, or its encoding lacks a character
        with suppress(OSError, ValueError):
            print(text.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
            return True
        return False
    return True


class Guarded:
    """Stream for logs, progress bars and warnings whose writes never raise."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, or drop it on an error; return its length."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, and ignore an error."""
        self._attempt(self._stream.flush)

    def _attempt(self, work: Callable[[], object]) -> None:
        """Call ``work`` and ignore an OSError or ValueError; silence the stream if its reader has closed it."""
        try:
            work()
        except OSError as error:
            if error.errno in _GONE:
                silence(self._stream)
        except ValueError:  # the stream is closed
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded_stderr() -> Iterator[None]:
    """Replace ``sys.stderr`` by a :class:`Guarded` stream inside the block; if ``sys.stderr`` is None, do nothing."""
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
    """Redirect the file descriptor of the stream, if it has one, to the null device, and flush the stream."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())  # type: ignore[union-attr]
        finally:
            os.close(null)
        stream.flush()  # type: ignore[union-attr]


def reader_is_gone(stream: TextIO | None) -> bool:
    """Return whether the stream is a pipe or socket whose other end is closed; False if that cannot be determined."""
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
    """Flush the stream at the end of a command; if writing fails, silence the stream and return the error, otherwise None."""
    try:
        if stream is not None:
            stream.flush()
    except OSError as error:
        silence(stream)
        return error
    except ValueError:  # the stream is closed
        return None
    return None
