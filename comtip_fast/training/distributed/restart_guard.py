"""Bad input under torchrun: its agent starts ranks again whatever they ended with, so a start that cannot help ends at once.

A rank that ends with bad input leaves a note for the next start of the same command under the same agent, in the
temporary folder of its node: the run's folder may be what is wrong. Nothing here is slow to import.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


class RestartGuard:
    """The note between two starts of one rank; does nothing outside torchrun.

    Parameters
    ----------
    arguments
        Of the command: another command is another note.
    environ
        The launcher's environment.
    """

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
        self._start = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._last = int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
        self._path: Path | None = None
        if "TORCHELASTIC_RUN_ID" in environ:
            # The agent is the parent of all starts of its ranks.
            of = [
                os.getppid(),
                environ["TORCHELASTIC_RUN_ID"],
                environ.get("LOCAL_RANK", ""),
                str(Path.cwd()),
                *arguments,
            ]
            name = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:24]
            self._path = Path(tempfile.gettempdir()) / f"comtip-refused-{os.getuid()}-{name}.json"
            if self._start == 0:
                self._path.unlink(missing_ok=True)

    def known(self) -> str | None:
        """Return what an earlier start ended with, where starting again does not help; else None."""
        message, final = self._read()
        if not final:
            return None
        self._forget_with_the_last()
        return f"{message} (start {self._start} of {self._last} again; it cannot help)"

    def note(self, message: str, begun: bool) -> None:
        """Leave a note of bad input.

        Parameters
        ----------
        message
            What is said of it.
        begun
            The run has a checkpoint. Then what worked before may work again (a file server, a lock), and only the same
            message a second time is the end of it.
        """
        if self._path is None:
            return
        before, _ = self._read()
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self._path.parent, delete=False) as file:
            json.dump([message, not begun or message == before], file)
        Path(file.name).replace(self._path)
        self._forget_with_the_last()

    def _read(self) -> tuple[str | None, bool]:
        try:
            if self._path is None or self._path.lstat().st_uid != os.getuid():
                return None, False
            message, final = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None, False
        return message, final

    def _forget_with_the_last(self) -> None:
        if self._path is not None and self._start >= self._last:
            self._path.unlink(missing_ok=True)
