"""Progress of long work: a bar on a terminal, and lines in the log without one, as in the log file of a batch job."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

log = logging.getLogger("comtip_shards")
LOG_EVERY_S = 30.0


class Progress:
    """Progress bar on a terminal, otherwise a line in the log at most every :data:`LOG_EVERY_S`; a context manager.

    Without ``show``, a message is logged only if the work is resumed.

    Parameters
    ----------
    label
        What is done.
    total, done
        Number of units, and number of them that were finished before, from which the remaining time is not estimated.
    unit
        Name of one unit.
    show
        Whether to show the progress.
    """

    def __init__(self, label: str, total: int, *, unit: str, show: bool, done: int = 0) -> None:
        self._label, self._total, self._first, self._done = label, total, done, done
        self._unit, self._show = unit, show
        self._bar = tqdm(total=total, initial=done, desc=label, unit=unit, disable=None if show else True)
        self._start = self._last = time.monotonic()
        if done:
            log.info("%s: resuming, %d of %d %ss are complete", label, done, total, unit)

    def update(self, n: int = 1) -> None:
        """Count ``n`` more finished units, and log the progress if it is due."""
        self._done += n
        self._bar.update(n)
        now = time.monotonic()
        if self._show and self._bar.disable and now - self._last >= LOG_EVERY_S and self._done < self._total:
            self._last = now
            left = (now - self._start) / (self._done - self._first) * (self._total - self._done)
            log.info("%s: %d of %d %ss, %.1f min left", self._label, self._done, self._total, self._unit, left / 60)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
