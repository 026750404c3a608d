"""Prevention of useless restarts: torchrun restarts a rank after any error, including bad input.

A rank that fails because of bad input writes a note, and the next start of the same command under the same agent exits
immediately. The note is in the node's temporary folder, because the run folder may be the cause of the error. This module is
imported first and imports nothing slow.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


class RestartGuard:
    """Passes a note from one start of a rank to the next; does nothing outside of torchrun.

    Parameters
    ----------
    arguments
        Arguments of the command; each list of arguments has its own note.
    environ
        Environment variables of the launcher.
    """

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
        self._start = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._last = int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
        self._path: Path | None = None
        if "TORCHELASTIC_RUN_ID" in environ:
            # All starts of a rank have the agent as their parent process.
            identity = [
                os.getppid(),
                environ["TORCHELASTIC_RUN_ID"],
                environ.get("LOCAL_RANK", ""),
                str(Path.cwd()),
                *arguments,
            ]
            name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
            self._path = Path(tempfile.gettempdir()) / f"comtip-refused-{os.getuid()}-{name}.json"
            if self._start == 0:
                self._path.unlink(missing_ok=True)

    def known(self) -> str | None:
        """Return the error message of an earlier start if a restart cannot fix the error, else None."""
        message, final = self._read()
        if not final:
            return None
        self._forget_with_the_last()
        return f"{message} (restart {self._start} of {self._last} stopped: a restart cannot fix this)"

    def note(self, message: str, begun: bool) -> None:
        """Record an error caused by bad input.

        Parameters
        ----------
        message
            The error message.
        begun
            Whether the run has a checkpoint. If so, the input was valid before and the error may be temporary (a file
            server, a lock), so only the same message a second time stops the restarts.
        """
        if self._path is None:
            return
        before, _ = self._read()
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self._path.parent, delete=False) as file:
            json.dump([message, not begun or message == before], file)
        Path(file.name).replace(self._path)
        self._forget_with_the_last()

    def _read(self) -> tuple[str | None, bool]:
        """Return the message of the note, and whether it stops restarts; (None, False) without a valid note of this user."""
        try:
            if self._path is None or self._path.lstat().st_uid != os.getuid():
                return None, False
            message, final = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None, False
        return message, final

    def _forget_with_the_last(self) -> None:
        """Delete the note if torchrun will not start this rank again."""
        if self._path is not None and self._start >= self._last:
            self._path.unlink(missing_ok=True)
