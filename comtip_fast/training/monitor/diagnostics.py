"""Diagnostics that cannot end a run: an error is logged as a warning and replaced by a default value."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger("comtip_fast")
_REPORTED: set[str] = set()


def diagnostic(what: str, compute: Callable[[], T], otherwise: T) -> T:
    """Return ``compute()``, or ``otherwise`` if it raises; the first error of each ``what`` is logged as a warning.

    ``compute`` must not call a collective: if one rank raised, the others would wait for it.

    Parameters
    ----------
    what
        Name of the diagnostic, for the warning.
    compute
        Computes or writes the diagnostic.
    otherwise
        Value to return after an error.
    """
    try:
        return compute()
    except Exception as error:  # any error: the check for non-finite losses must always run
        if what not in _REPORTED:
            _REPORTED.add(what)
            log.warning("%s failed, training continues without it: %s: %s", what, type(error).__name__, error)
        return otherwise


def undefined(names: Iterable[str]) -> dict[str, float]:
    """Return ``{name: NaN}`` for every name, the value of a failed diagnostic."""
    return dict.fromkeys(names, float("nan"))
